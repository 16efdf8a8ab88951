"""README says what the script does, and its blocks work as they stand."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from command import REPOSITORY, SCRIPT, UPLOAD, environment, run_command
from emulator import Emulator
from google.cloud import batch_v1
from google.protobuf import json_format

import imagenet_to_gcs as script

README = (REPOSITORY / "README.md").read_text("utf-8")

# Flags of other commands that the guide shows; a hyphen tells most.
FOREIGN = {"data_dir"}

# Flags of absl, and what every command has, that users of the script need.
INHERITED = {"flagfile", "verbosity", "help", "version"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block(language: str, beginning: str) -> str:
    [found] = [text for text in blocks(language) if text.startswith(beginning)]
    return found


def own_flags() -> dict[str, str]:
    """Returns the flags that the script defines, with the text of their help."""
    of_module = script.FLAGS.flags_by_module_dict()[script.__name__]
    return {flag.name: flag.help for flag in of_module}


def named_flags(text: str) -> set[str]:
    """Finds the flags that a text names, `--nogcs_upload` as `gcs_upload`."""
    names = set(re.findall(r"(?<![\w-])--(\w+)(?![\w-])", text))
    own = own_flags()
    return {
        name.removeprefix("no") if name.removeprefix("no") in own else name
        for name in names
    }


def rows() -> list[str]:
    return [line for line in README.splitlines() if line.startswith("| `--")]


def python_range(text: str) -> tuple[str, ...]:
    [found] = set(re.findall(r"(3\.\d+)(?: to |,<)(3\.\d+)", text))
    return tuple(found)


# What it says of the script


def test_every_flag_has_a_row_and_no_other() -> None:
    named = {name for row in rows() for name in named_flags(row.split("|")[1])}
    assert sorted(named) == sorted(INHERITED | own_flags().keys())


def test_no_flag_is_named_that_is_not_there() -> None:
    """Among those with an underscore, as all of the script's but one have."""
    unknown = named_flags(README) - own_flags().keys() - FOREIGN
    assert sorted(name for name in unknown if "_" in name) == []


def test_flags_say_what_they_are_for() -> None:
    assert all(own_flags().values())


@pytest.mark.parametrize("name", ["training_shards", "validation_shards"])
def test_defaults_are_those_of_the_flags(name: str) -> None:
    [row] = [row for row in rows() if name in row.split("|")[1]]
    assert str(script.FLAGS[name].default) in row


def test_requirements_and_python_are_those_of_the_script() -> None:
    """Its header is what uv reads; the upper end of its range is exclusive."""
    header = SCRIPT.read_text("utf-8").partition("# ///\n")[0]
    required = (REPOSITORY / "requirements.txt").read_text("utf-8").split()
    assert re.findall(r'^#   "(.+)",$', header, re.MULTILINE) == required
    lowest, above = python_range(header)
    assert python_range(README) == (lowest, f"3.{int(above.split('.')[1]) - 1}")


def test_the_visible_part_is_short() -> None:
    """What is folded into <details> is for those who look for it."""
    rest = re.sub(r"<details>.*?</details>\n\n", "", README, flags=re.DOTALL)
    assert len(rest.splitlines()) <= 220


# Its blocks


@pytest.mark.parametrize("text", blocks("bash"))
def test_shell_parses(text: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_result_is_read_as_shown(raw: Path, tmp_path: Path, emulator: Emulator) -> None:
    """From shards that lie flat, as in the bucket: 12 images in 4 classes."""
    flags = (f"--raw_data_dir={raw}", "--training_shards=2", "--validation_shards=1")
    assert run_command(*flags, *UPLOAD, env=emulator.environment).status == 0
    for name, content in emulator.objects().items():
        (tmp_path / Path(name).name).write_bytes(content)
    command = [sys.executable, "-c", block("python", "import os")]
    output = run_shell(command, tmp_path, {"DATA_DIR": str(tmp_path)})
    [labels] = re.findall(r"^\(12, 224, 224, 3\) \[(.*)\]$", output, re.MULTILINE)
    assert set(labels.split()) == {"0", "1", "2", "3"}
    assert (tmp_path / "first.jpg").read_bytes().startswith(b"\xff\xd8\xff")


def test_run_file_of_the_guide(raw: Path, tmp_path: Path, emulator: Emulator) -> None:
    """It is written, and checks everything, with what step 1 puts into settings.sh."""
    home = make_home(tmp_path, ".venv")
    [settings] = re.findall(r'^echo "(export .*)" > settings.sh$', README, re.MULTILINE)
    variables = {"PROJECT": "project", "BUCKET": "bucket", "HOME": str(home)}
    line = run_shell(["bash", "-c", f'echo "{settings}"'], home, variables)
    (home / "settings.sh").write_text(line)
    raw.rename(home / "imagenet")
    text = block("bash", "cat > ~/run.sh")
    output = run_shell(
        ["bash", "-ec", text], home, {"HOME": str(home), **emulator.environment}
    )
    assert "Would write 1,152 shards of 16 images" in output
    assert emulator.objects() == {}


@pytest.mark.parametrize("engine", ["slurm", "kubernetes", "batch"])
def test_engine_starts_its_task(
    engine: str, raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    """Its command, in the shared directory, with the engine's variables."""
    home = make_home(raw, ".venv")
    text, variables = engine_command(engine)
    text = text.replace("/raw", str(raw)).replace("gs://my-bucket", "gs://bucket")
    mine = {**emulator.environment, "IMAGENET_HOME": str(raw), "TMPDIR": str(tmp_path)}
    mine |= {"PROJECT": "project", "DATA_DIR": "gs://bucket/imagenet"}
    path = f"{home / '.venv' / 'bin'}:{os.environ['PATH']}"
    output = run_shell(
        ["bash", "-ec", text], tmp_path, {**mine, **variables, "PATH": path}
    )
    assert "Task 3 of 8" in output
    assert "Would write 144 shards" in output


def test_slurm_job_without_its_settings_says_which() -> None:
    text, variables = engine_command("slurm")
    done = subprocess.run(
        ["bash", "-c", text],
        env=environment(variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "IMAGENET_HOME" in done.stderr


@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_kubernetes_accepts_its_job(version: str) -> None:
    job = yaml.safe_load(block("yaml", "apiVersion"))
    kubernetes_validate.validate(job, version, strict=True)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 8
    # Which no schema says: a failure policy, and a limit per index, need it.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_batch_accepts_its_job() -> None:
    job = yaml.safe_load(block("yaml", "logsPolicy"))
    json_format.ParseDict(job, batch_v1.Job.pb(batch_v1.Job()))
    assert job["taskGroups"][0]["taskCount"] == 8


def engine_command(engine: str) -> tuple[str, dict[str, str]]:
    """Returns the shell text that an engine runs, and what it sets for task 3."""
    if engine == "slurm":
        return block("bash", "#!/bin/bash"), {"SLURM_ARRAY_TASK_ID": "3"}
    if engine == "kubernetes":
        pod = yaml.safe_load(block("yaml", "apiVersion"))["spec"]["template"]["spec"]
        return pod["containers"][0]["command"][2], {"JOB_COMPLETION_INDEX": "3"}
    [group] = yaml.safe_load(block("yaml", "logsPolicy"))["taskGroups"]
    container = group["taskSpec"]["runnables"][0]["container"]
    return container["commands"][1], {"BATCH_TASK_INDEX": "3"}


def make_home(directory: Path, environment_name: str) -> Path:
    """Puts a copy of the script, and a Python that only adds --dry_run, there."""
    programs = directory / environment_name / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "python3"):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --dry_run')
        (programs / name).chmod(0o755)
    (programs / "pip").symlink_to("/bin/true")
    (directory / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    return directory


def run_shell(command: list[Any], cwd: Path, variables: Mapping[str, str]) -> str:
    """Runs a command that must succeed; returns what it printed and logged."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
