"""The reward service: HTTP around `RewardModel`. Begin at `app.py`; the command is `serve.py`.

A request passes `gate` (who, how large, how fast), `wire` and `formats` (JSON and forms -> groups),
`scorer` (pictures -> encoded groups -> answers) and `batcher` (groups of all callers -> one program
call). `limits` and `refusals` are the tables of what is allowed and how a refusal is said.
"""
