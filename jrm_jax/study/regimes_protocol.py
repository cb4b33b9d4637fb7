"""What the page of the study's second part says of how it was done: trials, budget, protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.shell.terminal import duration
from jrm_jax.study.tables import NOT_YET, table

Numbers = Mapping[str, Any]


def trials(config: ConfigDict, numbers: Numbers) -> list[str]:
    rows = []
    for trial in numbers["trials"]:
        curve = ", ".join(f"{step:g}: {100 * value:.1f}" for step, value in trial["curve"])
        place = (trial["arm"], f"{trial['labelled']:,}", f"{100 * trial['flip']:g} %")
        rows.append((*place, f"{trial['rate']:g}", str(trial["steps"]),
                     f"{100 * trial['valid']:.1f}", curve))  # fmt: skip
    train = config.train
    head = ("arm", "labelled", "wrong", "learning rate", "steps", "valid, best step",
            "valid by step")  # fmt: skip
    others = "".join(f", {rate:g} in {', '.join(arms)}" for arms, rate in config.rates)
    return [
        "## How length and learning rate were chosen",
        "",
        "On `valid`, seed 0: the length by the discriminative arm alone, a learning rate by each "
        f"arm of the claim for itself. In use: {train.total_steps} steps, learning rate "
        f"{train.optimizer.learning_rate:g}{others}. {config.chosen}",
        "",
        *(table(head, rows) if rows else [f"{NOT_YET.capitalize()}.", ""]),
    ]


def budget(config: ConfigDict, numbers: Numbers) -> list[str]:
    found = numbers["budget"]
    made, missing = len(found["cells"]), len(found["missing"])
    left = found["missing_seconds"]
    about = f", about {duration(left)} at the pace so far" if left else ""
    rows = [(name, duration(s["train"]), duration(s["measure"])) for name, s in
            found["cells"].items()]  # fmt: skip
    return [
        "## Budget",
        "",
        f"Written before the first cell of the headline: {config.budget_hours:g} hours of one core "
        f"that has nothing else to do. {config.budget_words} So far {made} cells took "
        f"{duration(found['seconds'])} of wall time; {missing} are not yet run{about}. "
        + "".join(f"{count} ran on {name}. " for name, count in found["machines"].items()).rstrip(),
        "",
        *(table(("cell", "training", "measuring"), rows) if rows else []),
    ]


def _spreads(config: ConfigDict, numbers: Numbers) -> str:
    """How much seeds differ, in words."""
    said = []
    for size, arms in numbers["spreads"].items():
        if not arms:
            continue
        deviations = [100 * spread["deviation"] for spread in arms.values()]
        freedom = next(iter(arms.values()))["freedom"]  # the same for all
        said.append(
            f"{min(deviations):.1f} to {max(deviations):.1f} points with {int(size):,} "
            f"({freedom} degrees of freedom)"
        )
    alone = "With one seed they are of groups alone, so that they say nothing of other seeds. "
    if not said:
        return alone
    return (
        f"Where a place has fewer than {config.verdict.seeds} seeds, how much one seed's number "
        "varies is taken from all arms and shares of wrong votes with as many labels, or from the "
        "arm's own shares where these vary more: two or three seeds tell little of it, and one "
        f"tells nothing. Of a gain on `hard` the standard deviation is {', '.join(said)}; degrees "
        "of freedom are counted once for each share of wrong votes, as arms share the runs that "
        "they are compared with. Arms that begin with critiques alone are a pool apart, because "
        "their seeds differ by that run, too; that was decided when their first cells were there. "
        "The rest of this was decided after the cells of the curves were there; the "
        f"claim is of {config.verdict.seeds} seeds of its own, as it was fixed. A test measures "
        "that such intervals hold the truth as often as they say. "
    )


def protocol(config: ConfigDict, numbers: Numbers) -> list[str]:
    train, world, rows = config.train, config.world, config.labelled_rows
    return [
        "## Protocol",
        "",
        f"- {config.groups:,} groups of the built-in world. Some are labelled: one pair, chosen by "
        "chance, with one vote, which is wrong with the chance given, unless the two are equally "
        "good: such votes, 6.7 %, stay half to each, so that of all votes 33 % are wrong where "
        "it says 35 %. All have critiques. `valid`, "
        "`test` and `hard` are clean, with all pairs.",
        f"- Every batch of every arm holds {rows} labelled groups, the same ones in the same "
        f"order; where {rows} does not divide their number, the last batch of a pass over them "
        "holds what is left (with 100 every 13th batch holds 4). An arm that learns from "
        f"critiques has {rows} more rows, drawn from all groups; their labels "
        "do not count. So labels are seen equally often in all arms, and critiques cost time and "
        "nothing else.",
        f"- {train.total_steps} steps in all arms, and {config.stage_steps} of critiques alone "
        "before them in the arms that begin so. The checkpoint with the best accuracy on "
        f"`valid` ({world.valid} groups) counts.",
        "- Teacher: the score that a critique's last line states, 0.6 following + 0.4 preservation "
        "of ten, makes soft preferences, sigmoid of the difference, for all pairs of all rows.",
        "- Noisy critiques: a fifth of what they state is replaced by another word of its kind, "
        "and their scores correlate with gold at 0.7.",
        f"- `test` has {world.test} groups, `hard` {world.hard}. Intervals: "
        f"{100 * config.verdict.confidence:g} %. Of groups by {config.verdict.draws} bootstrap "
        "draws of whole groups, of seeds by Student's t; half-widths are the root of the two "
        f"squares. {_spreads(config, numbers)}Differences are paired by seed and pair. In the "
        "curves they are not corrected for the number of arms. In the table of what to use they "
        "are, for as many as "
        f"there are with such critiques, and an arm is named from {config.verdict.advice_seeds} "
        "seeds on.",
        "- Preference loss: mean of -log sigmoid(difference) on the true order of all pairs of "
        "`hard`; 0.693 is what knowing nothing costs. Other measures as in [the first "
        "part](study.md); the attack is measured for seed "
        f"{', '.join(map(str, config.whole_seeds)) or '-'} of the headline.",
        "",
    ]
