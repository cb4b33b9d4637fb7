"""What every command shows and is given: text and progress (`terminal.py`), arguments, results.

`config_cli.py` is the command line of commands with a config; `disk.py` puts a disk's errors into
words. Imports nothing of the project but errors.
"""
