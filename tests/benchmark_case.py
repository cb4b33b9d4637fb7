"""Measuring a benchmark's predictions, for the tests of the layouts."""

from jrm_jax import evaluate
from jrm_jax.evaluation.cases import Answer, Issues, Judged
from jrm_jax.evaluation.layouts import LAYOUTS
from jrm_jax.evaluation.metrics import point_value


def run(out, benchmark, data=None, predictions=None, *more):
    words = [f"--benchmark={benchmark}", f"--out={out}", *more]
    words += [f"--data={data}"] if data else []
    words += ["--predictions", *map(str, predictions)] if predictions else []
    return evaluate.evaluate(evaluate.parse_args(words))


def number(result, section, metric):
    (row,) = [r for r in result["rows"] if (r["section"], r["metric"]) == (section, metric)]
    return row


def issue(result, start):
    found = [items for kind, items in result["issues"].items() if kind.startswith(start)]
    return found[0]["items"] if found else []


def answered(name, path, score):
    """Cases of a benchmark with scores from a function of their place."""
    benchmark = LAYOUTS[name].read(str(path), Issues())
    cases = enumerate(benchmark.cases)
    return benchmark, [Judged(case, Answer(score(i, case))) for i, case in cases]


def values(name, benchmark, judged, threshold=0.0):
    return {(m.section, m.name): point_value(m)
            for m in LAYOUTS[name].measure(benchmark, judged, threshold)}  # fmt: skip
