"""A run's folder: whose it is, what may change between two starts, and one trainer at a time."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from configs import discriminative, joint
from jrm_jax import build, train
from jrm_jax.data import sizes
from jrm_jax.errors import UserError
from jrm_jax.run import lock, workdir
from jrm_jax.shell import disk

ROOT = Path(__file__).resolve().parents[1]


# Its name


@pytest.mark.parametrize(
    ("variant", "path", "mixture", "wanted"),
    [
        (None, "", (), "joint"),
        (None, "/sets/edits/", (), "joint-edits"),
        (None, "/sets/../sets/other", (), "joint-other"),
        ("qwen3_vl_8b", "edits", (), "joint-qwen3_vl_8b-edits"),
        (None, "", (("/a/one", 1.0), ("/b/two", 0.5)), "joint-one+two"),
        (None, "", tuple((f"/a/{'x' * 20}{i}", 1) for i in range(9)), None),
    ],
)
def test_the_default_name_tells_the_data(variant, path, mixture, wanted):
    config = joint.get_config(variant)
    config.data.path, config.data.mixture = path, mixture
    found = workdir.default_name(config)
    assert found == wanted if wanted else len(found) == len("joint-") + workdir.LONGEST


# Its config


def stored(folder: Path, config, forget=(), **changes) -> Path:
    """`folder` of a run with `config`, written by a program without the fields `forget`."""
    fields = json.loads(workdir.as_text(config)) | changes
    for name in forget:
        *parents, last = name.split(".")
        part = fields
        for parent in parents:
            part = part[parent]
        del part[last]
    (folder / workdir.CONFIG).write_text(json.dumps(fields))
    return folder


def test_fields_that_came_later_are_no_difference_at_their_defaults(tmp_path):
    config = joint.get_config()
    forget = ("loss.words_weight", "lora", "data.mixture", "keep_interval")
    stored(tmp_path, config, forget)
    assert workdir.check_config(tmp_path, config) == config.total_steps
    found = workdir.read_config(tmp_path)
    assert found.lora.rank == 0 and found.loss.words_weight == 0.0
    assert json.loads(workdir.as_text(found)) == json.loads(workdir.as_text(config))
    config.loss.words_weight = 0.5
    with pytest.raises(UserError, match=r"\(loss.words_weight: 0.0 -> 0.5\)"):
        workdir.check_config(tmp_path, config)


def test_how_scores_would_be_learnt_is_no_difference_where_they_are_not(tmp_path):
    """A real joint run from before its variants learnt stated scores goes on without them."""
    before = joint.get_config("qwen3_vl_2b")
    before.loss.update({"teacher_weight": 0.0, "teacher_scale": 1.0})
    stored(tmp_path, before)
    config = joint.get_config("qwen3_vl_2b")
    changed = r"\(loss.teacher_scale: 1.0 -> 0.0; loss.teacher_weight: 0.0 -> 0.33"
    with pytest.raises(UserError, match=changed):
        workdir.check_config(tmp_path, config)
    config.loss.teacher_weight = 0.0
    assert workdir.check_config(tmp_path, config) == before.total_steps


def test_a_field_that_went_is_a_difference(tmp_path):
    stored(tmp_path, joint.get_config(), old_way=3)
    with pytest.raises(UserError, match=r"\(old_way: 3 -> absent\)"):
        workdir.check_config(tmp_path, joint.get_config())


def test_how_a_run_is_watched_may_change(tmp_path):
    stored(tmp_path, joint.get_config())
    config = joint.get_config()
    config.profile, config.watchdog_seconds, config.data.workers = (3,), 9.0, 2
    workdir.check_config(tmp_path, config)
    config.seed = 2
    with pytest.raises(UserError, match="seed: 0 -> 2"):
        workdir.check_config(tmp_path, config)


def test_more_steps_are_no_difference(tmp_path):
    config = joint.get_config()
    stored(tmp_path, config)
    before = config.total_steps
    config.total_steps = before + 300
    assert workdir.check_config(tmp_path, config) == before
    config.seed = 2
    with pytest.raises(UserError, match="seed: 0 -> 2"):
        workdir.check_config(tmp_path, config)
    config.seed, config.total_steps = 0, before - 100
    with pytest.raises(UserError, match=f"total_steps: {before} -> {before - 100}"):
        workdir.check_config(tmp_path, config)


def test_what_more_steps_do_to_the_learning_rate_is_said():
    config = discriminative.get_config()
    config.total_steps, config.optimizer.warmup_steps = 1200, 0
    words = build.describe_more_steps(config, 900, 900)
    assert words == (
        "900 steps become 1200: the learning rate (cosine) goes from 7.5e-05 to 0.000284 at step "
        "900, and ends at 7.5e-05"
    )
    config.optimizer.schedule, config.loss.language_end = "constant", 0.0
    words = build.describe_more_steps(config, 900, 900)
    assert "(constant) goes from 0.0015 to 0.0015" in words and "language loss" in words


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, when):
    """The lock writes every 15 seconds: a full disk got 5,700 files a day."""
    path = tmp_path / "lock.json"
    path.write_text("before")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when != "write":
        monkeypatch.setattr(disk.os, when, fail)
    content = fail if when == "write" else "after"
    with pytest.raises(OSError, match="No space left"):
        disk.write_whole(path, content)
    assert not sizes.write_cache(path, content)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["lock.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut results.json had its name, and nothing in it."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            disk.os, name, lambda *rest, real=real, name=name: (done.append(name), real(*rest))
        )
    workdir.write_results(tmp_path, "{}")
    assert done == ["fsync", "replace"] and (tmp_path / "results.json").read_text() == "{}"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}"])
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"/results.json .*: remove it, and the command that"):
        workdir.read_results(tmp_path)
    (tmp_path / "results.json").unlink()
    assert workdir.read_results(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"step": 4}', '{"step": 4, "splits": 1}'])
def test_what_a_damaged_final_evaluation_had_read_is_read_again(tmp_path, text):
    (tmp_path / "final.json").write_text(text)
    assert workdir.read_final(tmp_path, 4) == {}
    workdir.write_final(tmp_path, 4, {"test": {"pairs": 2.0}})
    assert workdir.read_final(tmp_path, 4) == {"test": {"pairs": 2.0}}
    assert workdir.read_final(tmp_path, 5) == {}


def test_a_damaged_config_is_one_line(tmp_path):
    (tmp_path / workdir.CONFIG).write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        workdir.check_config(tmp_path, joint.get_config())
    for text in ("[]", "5", '{"loss": 5}', '{"data": {"world": []}}'):
        (tmp_path / workdir.CONFIG).write_text(text)
        with pytest.raises(UserError, match=r"config.json.* is damaged: it should be an object"):
            workdir.check_config(tmp_path, joint.get_config())


# One trainer at a time

HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from jrm_jax.run.lock import hold
with hold(Path({folder!r}), beat=0.05):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def another_trainer(folder: Path):
    script = HOLD.format(root=str(ROOT), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_trainer_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    said = []
    with another_trainer(tmp_path) as other:
        with pytest.raises(UserError) as caught:
            train.run(joint.get_config(), tmp_path)
        name = f"process {other.pid} on {os.uname().nodename} (since "
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == [lock.LOCK]
        other.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / lock.LOCK).exists()  # and nobody has buried the process yet
        with lock.hold(tmp_path, said.append) as held:
            held.check()
    assert not said and not (tmp_path / lock.LOCK).exists()


def of_another_machine(folder: Path, **changes) -> Path:
    holder = lock.Holder("elsewhere", 1, "its boot", "5", "yesterday", "its token")
    path = folder / lock.LOCK
    disk.write_whole(path, json.dumps(holder._replace(**changes)._asdict()))
    return path


def test_another_users_process_that_cannot_be_seen_may_live(monkeypatch):
    """As on a machine whose /proc is mounted with hidepid: its signs of life are watched."""
    found = lock.Holder("here", 5, lock._place(), "77", "yesterday", "its token")

    def refuse(*_):
        raise PermissionError

    def gone(*_):
        raise ProcessLookupError

    monkeypatch.setattr(lock, "_began", lambda process: None)
    for answer, lives in ((refuse, None), (gone, False), (lambda *_: None, False)):
        monkeypatch.setattr(os, "kill", answer)
        assert lock._lives(found) is lives
    monkeypatch.setattr(lock, "_began", lambda process: "78")
    assert lock._lives(found) is False


def test_of_many_that_start_at_once_one_trains(tmp_path, monkeypatch):
    """Over the lock of a process that is dead, which all of them see before any takes it."""
    of_another_machine(tmp_path, place=lock._place(), process=2**30)
    lives, together, taken, refused = lock._lives, threading.Barrier(8), [], []

    def see_together(found):
        alive = lives(found)
        if not alive:
            together.wait(60)
        return alive

    monkeypatch.setattr(lock, "_lives", see_together)

    def start():
        try:
            taken.append(lock._take(tmp_path, refused.append, 1.0))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7, refused
    assert all(f"is in use, process {os.getpid()} on" in words for words in refused)
    assert [p.name for p in tmp_path.iterdir()] == [lock.LOCK]


def test_a_trainer_on_another_machine_is_told_by_its_signs_of_life(tmp_path):
    path, said, ended = of_another_machine(tmp_path), [], threading.Event()
    with lock.hold(tmp_path, said.append, silence=0.3):
        assert json.loads(path.read_text())["process"] == os.getpid()
    (words,) = said
    assert "process 1 on elsewhere (since yesterday): waiting 0.3 s" in words

    def live():
        while not ended.wait(0.1):
            of_another_machine(tmp_path, beat=beats.append(0) or len(beats))

    beats = []
    of_another_machine(tmp_path)
    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(UserError, match="is in use, process 1 on elsewhere"):
            with lock.hold(tmp_path, said.append, silence=20.0):
                pass
    finally:
        ended.set()
        other.join()


def test_a_lock_without_a_name_is_waited_for_once(tmp_path):
    (tmp_path / lock.LOCK).write_text("")
    said = []
    with lock.hold(tmp_path, said.append, silence=0.2):
        assert len(said) == 1 and "not yet said who it is" in said[0]


def test_who_was_taken_over_saves_nothing_more(tmp_path):
    with lock.hold(tmp_path, beat=0.02) as held:
        held.check()
        path = of_another_machine(tmp_path)
        with pytest.raises(UserError, match="taken over by process 1 on elsewhere"):
            held.check()
        running = train._Run.__new__(train._Run)
        running.held, running.checkpoints = held, None
        with pytest.raises(UserError, match="saves nothing more"):
            running._save(3, {})
        threading.Event().wait(0.1)  # several signs of life
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used for a run"):
        with lock.hold(tmp_path / "file" / "run"):
            pass
