"""The batch script is pinned, what is added to it is checked, and nothing in it is read otherwise than it was given."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import code_copy, processes
from jobs.cluster import ClusterConfig, find_cluster, json_schema, load_cluster, shipped_configs
from jobs.run_dir import write_json
from jobs.slurm import environment, options, script
from jobs.spec import JobSpec, ResourceSpec
from tests.jobs.test_executor import make_spec

GOLDEN = Path(__file__).parent / "golden"
SHIPPED = sorted(path.stem for path in shipped_configs().glob("*.yaml") if path.stem != "local")


def shipped_spec(name: str, run_dir: Path, **changes: object) -> tuple[JobSpec, ClusterConfig]:
    """The job that `submit.py tp_fsdp --cluster NAME` means."""
    cluster = load_cluster(find_cluster(name))
    from jobs.cli.options import parse
    from jobs.cli.resolve import resolve

    words = ["tp_fsdp", "--cluster", name, "--run-dir", str(run_dir)]
    return resolve(parse(words)[1]).spec.model_copy(update=changes), cluster


def pinned(text: str, run_dir: Path) -> str:
    entries = [
        run_dir / "code" / "meshrun" / "jobs" / "entry.py",
        processes.ENTRY,
    ]  # the latter of an installed package
    places = (
        *((str(entry), "{ENTRY}") for entry in entries),
        (str(run_dir), "{RUN_DIR}"),
        (sys.executable, "{PYTHON}"),
    )
    for there, placeholder in places:
        text = text.replace(there, placeholder)
    return text


@pytest.mark.parametrize("name", SHIPPED)
def test_the_script_of_each_shipped_config_is_the_golden_one(name: str, tmp_path: Path) -> None:
    spec, cluster = shipped_spec(name, tmp_path / "run")
    text = pinned(script.script(spec, cluster, spec.rank_env), tmp_path / "run")
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


def everything(run_dir: Path) -> tuple[JobSpec, ClusterConfig]:
    resources = ResourceSpec(
        nodes=2,
        gpus_per_node=4,
        time_min=90,
        partition="gpu",
        account="my-project",
        qos="normal",
        cpus_per_gpu=8,
        mem_gb_per_gpu=62.5,
    )
    spec = make_spec(
        run_dir,
        resources=resources,
        env={"NCCL_DEBUG": "WARN", "GREETING": "it's $HOME"},
        job_name='the "best" one',
        sbatch={"mail-user": "me@site", "exclusive": True, "distribution": "plane=2", "requeue": False, "hold": False},
    )
    return spec, ClusterConfig(
        setup=["module load cuda"], gpu_request="gres", gpu_type="h100", srun_args=["--mpi=none", "--label"]
    )


def test_a_full_script_is_the_golden_one(tmp_path: Path) -> None:
    spec, cluster = everything(tmp_path / "run")
    text = pinned(script.script(spec, cluster, spec.rank_env), tmp_path / "run")
    assert text == (GOLDEN / "everything.sbatch").read_text()


def test_a_job_with_spare_hosts_outlives_the_loss_of_one(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", resources=ResourceSpec(nodes=2, spares=1), max_restarts=1)
    lines = script.script(spec, ClusterConfig(), {}).splitlines()
    assert {"#SBATCH --nodes=3", "#SBATCH --no-kill"} < set(lines)
    kept = ["--nodes=3", "--ntasks=3", "--no-kill", "--kill-on-bad-exit=0"]
    assert [word for line in lines if (word := line.strip(" \\")) in kept] == kept
    spec = make_spec(tmp_path / "run", resources=ResourceSpec(nodes=2))
    text = script.script(spec, ClusterConfig(), {})
    assert "no-kill" not in text
    assert "status=0" not in text


@pytest.mark.parametrize(
    ("site", "named"),
    [
        (["--mpi=none"], None),
        (["--container-image=a.sqsh"], []),
        (["--container-name=x", "--container-env=PATH,B_SECOND", "--label"], ["PATH", "B_SECOND"]),
    ],
    ids=["no image", "image", "named by the site"],
)
def test_pyxis_keeps_the_ranks_variables(site: list[str], named: list[str] | None, tmp_path: Path) -> None:
    """Which an image's own would win over otherwise, in silence."""
    spec = make_spec(tmp_path / "run", env={"A_FIRST": "1", "B_SECOND": "2"})
    cluster = ClusterConfig(srun_args=site)
    words = script.srun_arguments(spec, cluster, script.options(spec, cluster))
    kept = [word for word in words if "container-env" in word]
    if named is None:
        assert kept == []
    else:
        assert kept == ["--container-env=" + ",".join(dict.fromkeys([*named, *sorted(spec.rank_env)]))]
        assert set(site) - set(words) <= {"--container-env=PATH,B_SECOND"}


@pytest.mark.parametrize("name", [*SHIPPED, "everything"])
def test_bash_takes_every_golden_script(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(GOLDEN / f"{name}.sbatch")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_job_that_does_not_say_leaves_out_what_the_site_decides(tmp_path: Path) -> None:
    text = script.script(make_spec(tmp_path / "run"), ClusterConfig(), {})
    for flag in ("time", "partition", "account", "qos", "mem", "cpus-per-task"):
        assert f"--{flag}" not in text


def test_a_cluster_of_cpus_is_asked_for_no_gpus(tmp_path: Path) -> None:
    given = script.options(make_spec(tmp_path / "run"), ClusterConfig(gpu_request="none"))
    assert not {"gres", "gpus-per-node"} & set(given)
    assert given["ntasks-per-node"] == "4"


def test_a_path_with_spaces_stays_one_word(tmp_path: Path) -> None:
    text = script.script(make_spec(tmp_path / "a b"), ClusterConfig(), {})
    assert f'#SBATCH --output="{tmp_path}/a b/slurm.log"' in text
    assert f"MESHRUN_RUN='{tmp_path}/a b'" in text
    assert f"--agent '{tmp_path}/a b' \"$MESHRUN_NUMBER\" \\" in text


@pytest.mark.parametrize("name", ["a%j", "a\\b", "a\nb"])
def test_a_run_directory_that_slurm_would_rewrite_is_refused(name: str, tmp_path: Path) -> None:
    assert "which is not allowed in the names of log files" in (script.path_mistake(tmp_path / name) or "")


AWKWARD = {
    "SPACES": "  two  spaces  ",
    "QUOTES": 'it\'s "quoted"',
    "DOLLAR": "$HOME ${PATH} $(id) `id`",
    "LINES": "one\ntwo\n#SBATCH --nodes=9\n",
    "BACKSLASH": "a\\nb\\",
    "GLOB": "* ? [a]",
    "EMPTY": "",
    "DASH": "--nodes=9",
    "OTHER": "ü ; & | > < # !",
}


def test_any_value_survives_the_shell(tmp_path: Path) -> None:
    """The script itself, with an srun that only says what it was started with."""
    (tmp_path / "srun").write_text('#!/bin/sh\nenv -0 > "$run_dir/env"; printf "%s\\n" "$@" > "$run_dir/words"\n')
    (tmp_path / "srun").chmod(0o755)
    run_dir = tmp_path / "r; $HOME 'x\" y"
    run_dir.mkdir()
    cluster = ClusterConfig(srun_args=["--comment=a b; $HOME `id` \"x'"], command_prefix=["a b", "$c"])
    text = script.script(make_spec(run_dir), cluster, AWKWARD)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "run_dir": str(run_dir)}
    (run_dir / "attempt-0").mkdir()
    done = 'printf "{\\n  \\"status\\": \\"done\\"\\n}\\n" > "$run_dir/attempt-1/result.json"\n'
    (tmp_path / "srun").open("a").write(done)
    # The same names as the script would like for itself.
    env |= {"run": "mine", "status": "mine", "attempt": "mine"}
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    got = dict(item.split("=", 1) for item in (run_dir / "env").read_text().split("\0") if item)
    assert {name: got[name] for name in AWKWARD} == AWKWARD
    assert [got[name] for name in ("run", "status", "attempt")] == ["mine"] * 3
    words = (run_dir / "words").read_text().splitlines()
    assert cluster.srun_args[0] in words
    assert words[-7:] == ["$c", sys.executable, "-u", str(processes.ENTRY), "--agent", str(run_dir), "1"]
    assert f"--output={run_dir}/attempt-1/agent-%t.log" in words


def test_the_steps_exit_code_is_the_scripts(tmp_path: Path) -> None:
    """And whatever ends it, somebody is asked who failed: here a Python that only says what it was asked."""
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "run").mkdir()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for number, (setup, code) in enumerate(((["true"], 7), (["(exit 3)", "touch went-on"], 3))):
        text = script.script(make_spec(tmp_path / "run"), ClusterConfig(setup=setup), {})
        text = text.replace(f"{sys.executable} {processes.ENTRY}", "echo asked")
        done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=env, cwd=tmp_path)
        assert done.returncode == code
        assert done.stdout == f"asked --ended {tmp_path}/run {number} {code}\n"
    assert not (tmp_path / "went-on").exists()


@pytest.mark.parametrize("goes_on", [False, True])
def test_work_that_is_done_is_not_done_again(goes_on: bool, tmp_path: Path) -> None:
    """As by a job that Slurm starts again, for a host that it lost at the end; a resumed run goes on."""
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "srun").chmod(0o755)
    run = tmp_path / "run"
    done = {"status": "done", **({"next_attempt": 2} if goes_on else {})}
    for number, record in enumerate(({"status": "failed", "next_attempt": 1}, done)):
        (run / f"attempt-{number}").mkdir(parents=True)
        write_json(run / f"attempt-{number}" / "result.json", record)
    text = script.script(make_spec(run), ClusterConfig(), {})
    text = text.replace(f"{sys.executable} {processes.ENTRY}", "echo asked")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=env, cwd=tmp_path)
    assert ended.returncode == (7 if goes_on else 0)
    assert ended.stderr == ("" if goes_on else "meshrun: attempt 1 has done the work\n")
    assert (run / "attempt-2").exists() == goes_on


def test_a_script_that_can_make_no_attempts_folder_says_so_and_ends(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    text = script.script(make_spec(tmp_path / "run"), ClusterConfig(), {})
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (1, f"meshrun: {tmp_path}/run/attempt-0 cannot be made\n")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("nodes", "3", "use --nodes and --gpus-per-node"),
        ("arr", "0-1", "sbatch would read it as --array"),
        ("ntasks-per-nod", "3", "sbatch would read it as --ntasks-per-node"),
        ("signa", "USR1@3", "sbatch would read it as --signal"),
        ("clusters", "other", "a login node of that cluster"),
        ("gpus-per-task", "1", "use --gpus-per-node"),
        ("tasks-per-node", "1", "use --gpus-per-node"),
        ("tasks-per-nod", "1", "sbatch would read it as --tasks-per-node"),
        ("gpus-per-socket", "9", "use --gpus-per-node"),
        ("time-min", "3-00", "use --time"),
        ("time", "10", "use --time"),
        ("output", "x", "--run-dir"),
        ("array", "0-3", "sweep a setting: lr=1e-3,3e-4"),
        ("gres", "gpu:4", "the job already asks for its GPUs"),
        ("signal", "USR1@60", "ranks handle only USR2"),
        ("signal", "B:USR2@60", "ranks handle only USR2"),
        ("distribution", "diagonal", "must start with block"),
        ("--nice", "3", "without its dashes"),
        ("-p", "gpu", "without its dashes"),
        ("Nice", "3", "without its dashes"),
        ("nice\n#SBATCH --x", "3", "without its dashes"),
        ("comment", "a\nb", "line break"),
        ("comment", "a\0b", "line break"),
    ],
)
def test_options_that_cannot_be_added(name: str, value: str, words: str) -> None:
    assert words in (options.option_mistake(name, value) or "nothing")


SRUN_ARGUMENTS_THAT_CANNOT = [
    *("-n1", "-ln1", "-vvN2", "-K0", "-lK0", "--ntask=1", "--tasks-per-node=1", "--tasks-per=1", "--exp=NONE"),
    *("--kill", "-Q", "-lQ", "--quiet", "hostname", "-", "--", "-o x"),
]
SRUN_ARGUMENTS_THAT_CAN = [
    *("--mpi=none", "--cpu-bind=none", "--label", "-l", "-lv", "-wnode1", "-lxnode0", "--container-image=a b"),
]


@pytest.mark.parametrize("word", SRUN_ARGUMENTS_THAT_CANNOT)
def test_arguments_of_srun_that_cannot_be_added(word: str) -> None:
    assert options.srun_mistake(word)


def test_what_cannot_be_given_at_all_is_to_be_left_out() -> None:
    assert options.option_mistake("wrap", "x") == (
        "sbatch's --wrap has no meaning for a job that meshrun submits; leave it out"
    )
    assert options.srun_mistake("--qui") == "srun's --quiet would hide why agents ended; leave it out"


@pytest.mark.parametrize("word", SRUN_ARGUMENTS_THAT_CAN)
def test_arguments_of_srun_that_can(word: str) -> None:
    assert options.srun_mistake(word) is None


def test_what_a_site_adds_to_srun_does_not_undo_what_the_job_needs(tmp_path: Path) -> None:
    spec, cluster = make_spec(tmp_path / "run"), ClusterConfig(srun_args=["--label"])
    words = script.srun_arguments(spec, cluster, script.options(spec, cluster))
    assert words.index("--label") < words.index("--distribution=block")
    assert words.index("--cpu-bind=none") < words.index("--label")  # which the site may decide


def test_true_and_false_are_flags_only_where_an_option_can_stand_alone(tmp_path: Path) -> None:
    """A bare --comment would take the script's next option for its text."""
    from jobs.cli.options import parse
    from jobs.cli.resolve import resolve

    added = [f"--sbatch={word}" for word in ("comment=true", "exclusive=true", "hold=false", "requeue=false")]
    spec = resolve(parse(["tp_fsdp", "--cluster", "slurm", "--run-dir", str(tmp_path / "run"), *added])[1]).spec
    assert spec.sbatch == {"comment": "true", "exclusive": True, "hold": False, "requeue": False}


@pytest.mark.parametrize(("minutes", "warned"), [(None, True), (4, True), (3, False), (1, False)])
def test_no_warning_comes_while_ranks_are_being_started(minutes: int | None, warned: bool, tmp_path: Path) -> None:
    """Slurm may send it a minute early."""
    spec = make_spec(tmp_path / "run", resources=ResourceSpec(time_min=minutes))
    assert ("signal" in script.options(spec, ClusterConfig())) == warned
    spec = make_spec(tmp_path / "run", resources=ResourceSpec(time_min=minutes), sbatch={"signal": "USR2@20"})
    assert script.options(spec, ClusterConfig())["signal"] == "USR2@20"


def test_a_prefix_is_told_to_ignore_the_warning_and_gets_its_words(tmp_path: Path) -> None:
    report = "import signal; print(signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN, *sys.argv[1:])"
    prefix = [sys.executable, "-c", f"import sys; {report}", "it's", "$HOME"]
    words = script.agent_command(make_spec(tmp_path / "run"), ClusterConfig(command_prefix=prefix))
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("True it's $HOME ")
    assert done.stdout.split()[-1] == str(tmp_path / "run")


def test_options_that_can(tmp_path: Path) -> None:
    for name, value in {"mail-user": "me@site", "exclusive": True, "nice": "3", "gres": "craynetwork:1"}.items():
        assert options.option_mistake(name, value) is None
    spec = make_spec(tmp_path / "run", sbatch={"gres": "nic:1", "signal": "USR2@300", "mem": "0"})
    given = script.options(spec, ClusterConfig(gpu_request="gres"))
    assert (given["gres"], given["signal"], given["mem"]) == ("gpu:4,nic:1", "USR2@300", "0")


def test_srun_starts_one_agent_per_host_whatever_the_distribution_of_tasks_is(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", sbatch={"distribution": "arbitrary"})
    cluster = ClusterConfig(cpus_per_gpu=3)
    spec = spec.model_copy(update={"resources": spec.resources.model_copy(update={"cpus_per_gpu": 3})})
    words = script.srun_arguments(spec, cluster, script.options(spec, cluster))
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--distribution=block", "--cpus-per-task=12"} <= {*words}


def test_the_environment_of_a_surrounding_job_is_left_behind() -> None:
    inside = {
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_PER_NODE": "4",
        "SLURM_ARRAY_TASK_ID": "1",
        "SBATCH_DISTRIBUTION": "cyclic",
        "SRUN_CPUS_PER_TASK": "2",
        "SLURMD_NODENAME": "node1",
        "PMIX_RANK": "0",
        "MESHRUN_PROCID": "0",
        "SUBMITIT_EXECUTOR": "local",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "3",
        "MASTER_ADDR": "node0",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    stays = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "x", "RANKING": "1", "HOME": "/home/me"}
    assert environment.clean({**inside, **stays}) == stays
    # What somebody set on a login node is theirs.
    theirs = {"CUDA_VISIBLE_DEVICES": "1", "NCCL_SOCKET_IFNAME": "ib0"}
    assert environment.clean(theirs) == theirs


def test_the_json_schema_is_current() -> None:
    shipped = (shipped_configs() / "schema.json").read_text()
    assert shipped == json_schema(), "run: python -m jobs.cluster > cluster_configs/schema.json"


@pytest.mark.parametrize("name", ["local", *SHIPPED])
def test_each_shipped_config_names_the_schema(name: str) -> None:
    assert find_cluster(name).read_text().startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize(("status", "nested", "code"), [("stopped", "done", 0), ("done", "stopped", 1)])
def test_the_script_tells_a_stopped_run_by_its_own_status(status: str, nested: str, code: int, tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"status": status, "result": {"status": nested, "of": [{"status": nested}]}})
    line = next(
        line for line in (GOLDEN / "slurm.sbatch").read_text().splitlines() if "stopped" in line and "if" in line
    )
    test = line.partition("if ")[2].partition("; then")[0]
    assert subprocess.run(["bash", "-c", test], env={**os.environ, "MESHRUN_ATTEMPT": str(tmp_path)}).returncode == code


ARRAY = """\
+#SBATCH --array=0-7%3
+#SBATCH --dependency=afterok:12:13_4
+#SBATCH --kill-on-invalid-dep=yes
-#SBATCH --output={run}/slurm.log
+#SBATCH --output={run}/%a/slurm.log
-MESHRUN_RUN={run} MESHRUN_NUMBER=0
+MESHRUN_RUN={run}/"$SLURM_ARRAY_TASK_ID" MESHRUN_NUMBER=0
+    grep -qs '^  "status": "done"' "$MESHRUN_ATTEMPT/result.json" && rm -f "$MESHRUN_RUN/secrets.json"
-        "$SLURM_JOB_ID" "$SLURM_SUBMIT_HOST" "$SLURM_CLUSTER_NAME" >"$MESHRUN_RUN/.submission.json"
+        "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" "$SLURM_SUBMIT_HOST" "$SLURM_CLUSTER_NAME" \
>"$MESHRUN_RUN/.submission.json"
-    {python} -u {entry} --agent {run} "$MESHRUN_NUMBER" \\
+    {python} -u {entry} --agent "$MESHRUN_RUN" "$MESHRUN_NUMBER" \\
"""


def test_the_script_of_an_array_differs_where_each_job_has_its_own(tmp_path: Path) -> None:
    spec, cluster = shipped_spec("slurm", tmp_path / "run")
    after = spec.model_copy(update={"after_jobs": ("12", "13_4")})
    texts = [
        script.script(spec, cluster, spec.rank_env),
        script.script(after, cluster, spec.rank_env, "0-7%3"),
    ]
    differ = difflib.unified_diff(*(text.splitlines() for text in texts), n=0, lineterm="")
    lines = [line for line in differ if line[:2] not in ("--", "++", "@@")]
    entry = code_copy.entry(spec)
    places = {"{run}": str(tmp_path / "run"), "{python}": sys.executable, "{entry}": str(entry)}
    expected = ARRAY
    for placeholder, there in places.items():
        expected = expected.replace(placeholder, there)
    assert "\n".join(lines) + "\n" == expected
