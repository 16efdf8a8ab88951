"""README says what the script does, and its blocks work as they stand.

How each block is held:

- *Run as it stands*: the guide's run file, its dry run and its start; all that lays raw
  images out (extracting, Kaggle, Hugging Face, renaming, a subset); reading with
  `tf.data`; the index; checking by crc32c; from Python; Troubleshooting's messages.
- *Run with stand-ins* for `sudo`, `git`, `gcloud`, `kubectl`, `wget`, `rsync` and
  `scontrol`, which note how they were called: the rest of the shell.
- *Run as a task's engine does, and held against its schema*: Slurm, Kubernetes, Batch.
- *Compiled only*: PyTorch, JAX, DALI and TensorFlow Datasets, which are large; run by
  hand with torch 2.13.0, tfrecord 1.14.6, jax 0.10.2, nvidia-dali-cuda120 2.4.0
  (on a processor) and tensorflow-datasets 4.9.10.
"""

import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import contract
import kubernetes_validate
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from absl.flags import FLAGS
from command import REPOSITORY, SCRIPT, UPLOAD, Finished, environment, run_command
from emulator import Emulator, Stall, Status
from google.cloud import batch_v1
from google.protobuf import json_format
from processes import started, wait_for

import imagenet_to_gcs as script

README = (REPOSITORY / "README.md").read_text("utf-8")

# Flags of other commands that the guide shows; a hyphen tells most.
FOREIGN = {"data_dir"}

# Libraries that are too large for the tests: blocks that import them are compiled only.
LARGE = ("torch", "jax", "nvidia", "tensorflow_datasets")

# Flags of absl, and what every command has, that users of the script need.
INHERITED = {"flagfile", "verbosity", "help", "version"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block(language: str, beginning: str) -> str:
    [found] = [text for text in blocks(language) if text.startswith(beginning)]
    return found


def own_flags() -> dict[str, str]:
    """Returns the flags that the script defines, with the text of their help."""
    of_module = FLAGS.flags_by_module_dict()[script.__name__]
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
    assert str(FLAGS[name].default) in row


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
    assert len(rest.splitlines()) <= 230


# Its blocks


@pytest.mark.parametrize("text", blocks("bash"))
def test_shell_parses(text: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles(text: str) -> None:
    compile(text, "README.md", "exec")


def test_only_what_is_large_is_not_run() -> None:
    pattern = rf"^(?:import|from) (?:{'|'.join(LARGE)})\b"
    large = [
        text for text in blocks("python") if re.search(pattern, text, re.MULTILINE)
    ]
    run = [
        "import glob\nimport os\n\nimport pyarrow",
        "import glob\nimport os\nimport struct",
        "import os\nimport tensorflow",
        "import base64",
        "import imagenet_to_gcs",
    ]
    rest = [text for text in blocks("python") if text not in large]
    assert [text for text in rest if not text.startswith(tuple(run))] == []
    assert len(large) == 5


# Its blocks: try it, and the guide


def test_try_it(tmp_path: Path) -> None:
    """As it stands, but for the tools that install: it ends as README says."""
    home = make_home(tmp_path / "home" / "imagenet_to_gcs", ".venv", "")
    programs = stand_ins(tmp_path, "sudo", "git", "python3")
    variables = {"HOME": str(home.parent), "REPOSITORY": "https://x.invalid/y"}
    text = block("bash", "sudo apt-get update && sudo apt-get install --yes git")
    output = paste(text, home.parent, with_path(variables, programs))
    assert calls(programs)[2] == "git clone https://x.invalid/y imagenet_to_gcs"
    [shown] = re.findall(
        r"^2026-\S+ \S+ (The data set is complete.*)$", README, re.MULTILINE
    )
    last = output.splitlines()[-1].split(" ", 2)[2]
    assert without_size(last).replace(str(home.parent), "/home/you") == without_size(
        shown
    )


def without_size(line: str) -> str:
    """The size of images that TensorFlow draws differs a little between versions."""
    return re.sub(r"18\d\.\d MB", "SIZE", line)


def test_first_step_names_the_project_everywhere(tmp_path: Path) -> None:
    programs = stand_ins(tmp_path, "gcloud")
    text = block("bash", "cat > settings.sh")
    variables = with_path({"HOME": "/home/me"}, programs)
    paste(text, tmp_path, variables)
    made = calls(programs)
    assert [
        c for c in made if "add-iam" not in c and "--project=my-project" not in c
    ] == []
    assert "--location=us-central1 " in made[1]
    assert "--zone=us-central1-b --scopes=cloud-platform" in made[2]
    assert "gs://my-bucket --member=serviceAccount:stand-in --role=" in made[4]
    assert "scp imagenet_to_gcs.py requirements.txt settings.sh imagenet:" in made[5]
    assert made[6].startswith(
        "gcloud compute ssh imagenet --project=my-project --zone=us"
    )


@pytest.mark.parametrize(
    ("beginning", "names", "expected"),
    [
        (
            "sudo apt-get update && sudo apt-get install --yes python3-venv",
            ["sudo", "python3"],
            "python3 -m venv HOME/.venv",
        ),
        (
            ". ./settings.sh\ngcloud compute config-ssh",
            ["gcloud", "rsync"],
            "imagenet/ imagenet.us-central1-b.my-project:imagenet",
        ),
        (
            ". ./settings.sh\ngcloud compute instances delete",
            ["gcloud"],
            "delete imagenet --project=my-project --zone=us-central1-b",
        ),
        (
            ". ./settings.sh\ngcloud services enable container",
            ["gcloud", "kubectl"],
            "kubectl apply -f imagenet.yaml",
        ),
        (
            ". ./settings.sh\ngcloud services enable batch",
            ["gcloud"],
            "submit imagenet --project=my-project --location=us-central1 --config=",
        ),
    ],
)
def test_block_in_a_new_shell(
    beginning: str, names: list[str], expected: str, tmp_path: Path
) -> None:
    """All that it needs is in settings.sh."""
    home = make_home(tmp_path, ".venv")
    write_settings(home)
    programs = stand_ins(tmp_path, *names)
    text = block("bash", beginning)
    variables = with_path({"HOME": str(home)}, programs)
    paste(text, home, variables)
    assert expected.replace("HOME", str(home)) in calls(programs)[-1]
    assert "--project= " not in "".join(calls(programs))


def test_download_is_started_and_checked(tmp_path: Path) -> None:
    """With a `wget` that only notes how it was called, and tars that are damaged."""
    write_settings(tmp_path)
    programs = stand_ins(tmp_path, "wget")
    variables = with_path({"HOME": str(tmp_path)}, programs)
    text = block("bash", "TRAINING_LINK").replace(
        'LINK=""', 'LINK="https://x.invalid/t"'
    )
    paste(text, tmp_path, variables)
    link = "https://x.invalid/t"
    assert calls(programs) == [f"wget --continue --progress=dot:giga {link} {link}"]
    tars = [f"ILSVRC2012_img_{split}.tar" for split in ("train", "val")]
    for name in tars:
        (tmp_path / "imagenet" / name).write_bytes(b"damaged")
    text = block("bash", ". ~/settings.sh && cd $IMAGENET_HOME && touch")
    output = paste(text, tmp_path, variables)
    assert [f"{name}: FAILED" in output.splitlines() for name in tars] == [True, True]


def shows(path: Path, text: bytes) -> bool:
    return text in path.read_bytes()


def test_second_paste_of_the_download_only_watches(tmp_path: Path) -> None:
    """While one runs: here, a process of that name that sleeps."""
    write_settings(tmp_path)
    programs = stand_ins(tmp_path, "wget")
    (tmp_path / "wget.log").write_text("It runs.\n")
    output = tmp_path / "output"
    text = block("bash", "TRAINING_LINK")
    with subprocess.Popen(["bash", "-c", "exec -a wget sleep 100"]) as download:
        (tmp_path / "wget.pid").write_text(str(download.pid))
        name = Path(f"/proc/{download.pid}/cmdline")
        wait_for(lambda: name.read_bytes().startswith(b"wget"))
        with output.open("wb") as file:
            shell = subprocess.Popen(
                ["bash", "-c", f"{text}:"],
                env=environment(with_path({"HOME": str(tmp_path)}, programs)),
                stdout=file,
                stderr=file,
            )
        try:
            wait_for(functools.partial(shows, output, b"It runs."))
        finally:
            download.kill()
    assert (shell.wait(), calls(programs)) == (0, [])


def test_second_paste_of_the_start_only_watches(tmp_path: Path) -> None:
    """The run's number stays, and its log is shown again; `kill` stops it."""
    home = make_home(tmp_path, ".venv")
    program = home / ".venv" / "bin" / "python"
    code = "import time; print('It runs.', flush=True); time.sleep(100)"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    write_settings(home)
    (home / "run.sh").write_text(here_document(block("bash", "cat > ~/run.sh")))
    start = block("bash", "touch ~/run.pid")
    shells = []
    numbers = set()
    for index in range(2):
        output = home / f"output{index}"
        with output.open("wb") as file:
            shells.append(
                subprocess.Popen(
                    ["bash", "-c", f"{start}:"],  # `:` keeps bash, which reaps
                    cwd=home,
                    env=environment({"HOME": str(home)}),
                    stdout=file,
                    stderr=file,
                )
            )
        wait_for(functools.partial(shows, output, b"It runs."))
        numbers.add((home / "run.pid").read_text())
    assert len(numbers) == 1
    assert (home / "run.log").read_text().count("It runs.") == 1
    paste("kill $(cat ~/run.pid)", home, {"HOME": str(home)})
    assert [shell.wait() for shell in shells] == [0, 0]


def test_run_file_of_the_guide(raw: Path, tmp_path: Path, emulator: Emulator) -> None:
    """It is written, and checks everything, with what step 1 puts into settings.sh."""
    home = make_home(tmp_path, ".venv")
    write_settings(home, "bucket")
    raw.rename(home / "imagenet")
    text = block("bash", "cat > ~/run.sh")
    output = paste(text, home, {"HOME": str(home), **emulator.environment})
    assert "Would write 1,152 shards of 16 images" in output
    assert emulator.objects() == {}


# Its blocks: raw images from elsewhere


def make_extracted(raw: Path, directory: Path) -> str:
    """ImageNet's two tars, the training images' one of a tar for each class."""
    shutil.copy(raw / "synset_labels.txt", directory)
    for path in sorted((raw / "train").iterdir()):
        pack(directory / f"{path.name}.tar", sorted(path.iterdir()))
    classes = sorted(directory.glob("n*.tar"))
    pack(directory / "ILSVRC2012_img_train.tar", classes)
    for path in classes:
        path.unlink()
    images = sorted((raw / "validation").iterdir())
    pack(directory / "ILSVRC2012_img_val.tar", images)
    return block("bash", "mkdir -p train validation\ntar -xf ILSVRC")


def pack(path: Path, members: list[Path], prefix: str = "") -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for member in members:
            tar.add(member, f"{prefix}{member.name}")


def hugging_face_images(raw: Path) -> dict[str, list[tuple[str, int, bytes]]]:
    """Name, label and bytes of each image of a split, as Hugging Face has them."""
    synsets = sorted(path.name for path in (raw / "train").iterdir())
    of_validation = (raw / "synset_labels.txt").read_text().split()
    images = sorted((raw / "validation").iterdir())
    named = {
        "train": [(path, path.parent.name) for path in (raw / "train").glob("*/*")],
        "validation": list(zip(images, of_validation, strict=True)),
    }
    return {
        split: [
            (f"{path.stem}_{synset}.JPEG", synsets.index(synset), path.read_bytes())
            for path, synset in paths
        ]
        for split, paths in named.items()
    }


def make_hugging_face_tars(raw: Path, directory: Path, prefix: str = "") -> str:
    images = hugging_face_images(raw)
    (directory / "data").mkdir()
    for name, rows in {
        "train_images_0": images["train"][::2],
        "train_images_1": images["train"][1::2],
        "val_images": images["validation"],
    }.items():
        staged = directory / "staged" / name
        staged.mkdir(parents=True)
        for filename, _, data in rows:
            (staged / filename).write_bytes(data)
        members = sorted(staged.iterdir())
        pack(directory / "data" / f"{name}.tar.gz", members, prefix)
    return block("bash", "mkdir -p train validation\nRENAME")


def make_hugging_face_tars_with_directories(raw: Path, directory: Path) -> str:
    return make_hugging_face_tars(raw, directory, "./images/")


def make_hugging_face_parquet(raw: Path, directory: Path) -> str:
    shutil.copy(raw / "synset_labels.txt", directory)
    (directory / "data").mkdir()
    for split, rows in hugging_face_images(raw).items():
        images = [{"bytes": data, "path": name} for name, _, data in rows]
        labels = [label for _, label, _ in rows]
        table = pyarrow.table({"image": images, "label": labels})
        path = directory / "data" / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, path)
    text = block("python", "import glob\nimport os\n\nimport pyarrow")
    (directory / "extract.py").write_text(text)
    return f"{sys.executable} extract.py && rm synset_labels.txt"


def make_kaggle(raw: Path, directory: Path) -> str:
    """Kaggle's tree; its solutions are in no order, and hold boxes, too."""
    kaggle = directory / "kaggle"
    data = kaggle / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(raw / "train", data / "train")
    shutil.copytree(raw / "validation", data / "val")
    (data / "test").mkdir()
    labels = (raw / "synset_labels.txt").read_text().split()
    solutions = [
        f"ILSVRC2012_val_{i:08d},{label} 12 34 56 78 {label} 1 2 3 4 \n"
        for i, label in enumerate(labels, 1)
    ]
    text = "".join(["ImageId,PredictionString\n", *reversed(solutions)])
    (kaggle / "LOC_val_solution.csv").write_text(text)
    return f"KAGGLE={kaggle}\n" + block("bash", "ln -sfn $KAGGLE")


def make_named_jpg(raw: Path, directory: Path) -> str:
    shutil.copytree(raw, directory, dirs_exist_ok=True)
    paths = sorted(directory.glob("*/**/*.JPEG"))
    for path, suffix in zip(paths, [".jpg", ".jpeg", ".JPG", ".JPEG"] * 4, strict=True):
        path.rename(path.with_suffix(suffix))
    return block("bash", "find -L train validation")


MADE = [
    make_extracted,
    make_kaggle,
    make_hugging_face_tars,
    make_hugging_face_tars_with_directories,
    make_hugging_face_parquet,
    make_named_jpg,
]


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_raw_images_from_elsewhere_give_the_same_shards(
    make: Any, raw: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    text = make(raw, directory)
    paste(text, directory, {})
    assert shards_of(directory) == shards_of(raw)


def shards_of(raw_dir: Path) -> dict[str, bytes]:
    flags = ("--nogcs_upload", "--training_shards=2", "--validation_shards=1")
    assert run_command(f"--raw_data_dir={raw_dir}", *flags).status == 0
    return contract.local_shards(raw_dir / "tf_records")


def test_subset_is_linked(raw: Path, tmp_path: Path) -> None:
    text = block("bash", "CLASSES=").replace("n01443537 n01484850", "n01440838")
    paste(text, raw, {"HOME": str(tmp_path)})
    assert len(shards_of(tmp_path / "subset")) == 3
    manifest = json.loads((tmp_path / "subset/tf_records/manifest.json").read_text())
    assert manifest["examples"] == {"train": 6, "validation": 2}
    assert list(manifest["labels"].values()) == ["n01440764", "n01440838"]


# Its blocks: reading and checking


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


def test_index_says_where_each_record_lies(raw: Path, tmp_path: Path) -> None:
    """In lines of offset and size, as `tfrecord2idx` of DALI and of tfrecord do."""
    shards = shards_of(raw)
    command = [
        sys.executable,
        "-c",
        block("python", "import glob\nimport os\nimport s"),
    ]
    run_shell(command, tmp_path, {"SHARDS": str(raw / "tf_records")})
    for name, content in shards.items():
        position = 0
        for line in (tmp_path / "index" / name).read_text().splitlines():
            offset, size = map(int, line.split())
            (length,) = struct.unpack_from("<Q", content, offset)
            assert (offset, size) == (position, length + 16)
            position += size
        assert position == len(content) > 0
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == sorted(
        shards
    )


def test_damaged_and_missing_shards_are_found_by_their_crc32c(
    raw: Path, tmp_path: Path
) -> None:
    shards_of(raw)
    command = [sys.executable, "-c", block("python", "import base64")]
    variables = {"SHARDS": str(raw / "tf_records")}
    assert run_shell(command, tmp_path, variables) == ""
    (raw / "tf_records" / "validation" / "validation-00000-of-00001").unlink()
    damaged = raw / "tf_records" / "train" / "train-00001-of-00002"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    found = run_shell(command, tmp_path, variables).split()
    assert found == ["train-00001-of-00002", "validation-00000-of-00001"]


# Troubleshooting


def troubles() -> list[str]:
    """Returns the messages of the table, as patterns; numbers differ in the tests."""
    table = README.partition("| it prints |")[2].partition("</details>")[0]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    escaped = [re.escape(message).replace("…", ".*") for message in messages]
    return [re.sub(r"\d\d,\d\d\d", r"\\d+", message) for message in escaped]


def spoil(commands: str, raw: Path, *flags: str) -> Finished:
    contract.change(raw, commands)
    return run_command(f"--raw_data_dir={raw}", "--nogcs_upload", *flags)


def refused(fault: Status, raw: Path) -> Finished:
    with Emulator() as emulator:
        emulator.inject(fault, times=99)
        flags = (f"--raw_data_dir={raw}", *UPLOAD)
        return run_command(*flags, env=emulator.environment)


def without_credentials(raw: Path) -> Finished:
    env = {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere.json"}
    return run_command(f"--raw_data_dir={raw}", *UPLOAD, env=env)


def while_another_runs(raw: Path) -> Finished:
    with Emulator() as emulator:
        emulator.inject(Stall(600), kind="chunk", at=1, times=None)
        flags = (f"--raw_data_dir={raw}", *UPLOAD)
        with started(*flags, env=emulator.environment) as running:
            wait_for(emulator.objects, running)
            return run_command(*flags, env=emulator.environment)


def over_another_data_set(raw: Path) -> Finished:
    with Emulator() as emulator:
        flags = (f"--raw_data_dir={raw}", *UPLOAD)
        assert run_command(*flags, env=emulator.environment).status == 0
        (raw / "train/n01440764/n01440764_1.JPEG").unlink()
        return run_command(*flags, env=emulator.environment)


WEB_PAGE = "<!DOCTYPE html>"
MAKE_TROUBLE: list[Callable[[Path], Finished]] = [
    lambda raw: spoil("rm -r *", raw, f"--raw_data_dir={raw}/away"),
    lambda raw: spoil("mv train away", raw),
    lambda raw: spoil("for i in train/*/*; do mv $i ${i%.*}.jpg; done", raw),
    lambda raw: spoil("sed -i 1d synset_labels.txt", raw),
    lambda raw: spoil(
        f"rm -r train; echo '{WEB_PAGE}' > ILSVRC2012_img_train.tar", raw
    ),
    lambda raw: spoil(f"echo '{WEB_PAGE}' > train/n01440764/n01440764_1.JPEG", raw),
    without_credentials,
    lambda raw: refused(Status(403, "Denied: storage.objects.create"), raw),
    lambda raw: refused(Status(404, "The specified bucket does not exist."), raw),
    over_another_data_set,
    while_another_runs,
]


@pytest.mark.parametrize(
    ("message", "make"), list(zip(troubles(), MAKE_TROUBLE, strict=True))
)
def test_trouble_is_printed_as_readme_has_it(
    message: str, make: Callable[[Path], Finished], raw: Path
) -> None:
    finished = make(raw)
    assert finished.status != 0
    assert any(re.match(message, line) for line in finished.errors), finished.errors


# Its blocks: from Python


def run_python_block(beginning: str, raw: Path, emulator: Emulator) -> str:
    text = block("python", beginning).replace("gs://my-bucket", "gs://bucket")
    (raw.parent / "mine.py").write_text(text)
    raw.rename(raw.parent / "imagenet")
    variables = {**emulator.environment, "PYTHONPATH": str(REPOSITORY)}
    return run_shell([sys.executable, "mine.py"], raw.parent, variables)


def test_run_from_python(raw: Path, emulator: Emulator) -> None:
    run_python_block("import imagenet_to_gcs\n\n\ndef main", raw, emulator)
    assert len(emulator.objects()) == 8 + 2 + 1


def test_bad_image_from_python(raw: Path, emulator: Emulator) -> None:
    (raw / "train/n01440801/n01440801_2.JPEG").write_bytes(b"<html>")
    output = run_python_block("import imagenet_to_gcs\n\n\ndef main", raw, emulator)
    [line] = [line for line in output.splitlines() if line.startswith("All but")]
    assert "n01440801_2.JPEG" in line
    assert len(emulator.objects()) == 9


def test_refusal_from_python(raw: Path, emulator: Emulator) -> None:
    (raw / "synset_labels.txt").unlink()
    output = run_python_block("import imagenet_to_gcs\n\n\ndef main", raw, emulator)
    assert re.search("^No shard was written. .*synset_labels.txt", output, re.MULTILINE)
    assert emulator.objects() == {}


def test_convert_and_upload_from_python(raw: Path, emulator: Emulator) -> None:
    run_python_block("import imagenet_to_gcs\n\nif __name__", raw, emulator)
    assert len(emulator.objects()) == 1152


# Its blocks: many machines


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
    output = paste(text, tmp_path, {**mine, **variables, "PATH": path})
    assert "Task 3 of 8" in output
    assert "Would write 144 shards" in output


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        (0, "0", False),
        (1, "0", False),
        (75, "", True),
        (75, "4", True),
        (75, "5", False),
    ],
)
def test_slurm_queues_again_what_may_pass(
    status: int, restarts: str, requeued: bool, tmp_path: Path
) -> None:
    programs = stand_ins(tmp_path, "scontrol")
    home = make_home(tmp_path, ".venv")
    (home / ".venv" / "bin" / "python").write_text(f"#!/bin/sh\nexit {status}\n")
    text, variables = engine_command("slurm")
    variables |= {"PROJECT": "p", "DATA_DIR": "gs://b/d", "IMAGENET_HOME": str(home)}
    variables |= {"SLURM_RESTART_COUNT": restarts}
    done = subprocess.run(
        ["bash", "-c", text],
        env=environment(with_path(variables, programs)),
        check=False,
    )
    assert done.returncode == status
    assert calls(programs) == ["scontrol requeue 7_3"] * requeued


@pytest.mark.parametrize("engine", ["kubernetes", "batch"])
def test_packages_that_cannot_be_installed_are_tried_again(
    engine: str, tmp_path: Path
) -> None:
    pip = tmp_path / "pip"
    pip.symlink_to("/bin/false")
    text, variables = engine_command(engine)
    command = ["bash", "-ec", text]
    env = environment(with_path(variables, tmp_path))
    assert subprocess.run(command, env=env, check=False).returncode == 75


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
    evicted, failed = job["spec"]["podFailurePolicy"]["rules"]
    assert (evicted["action"], failed["action"]) == ("Ignore", "FailIndex")
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert failed["onExitCodes"]["containerName"] == container["name"]
    assert failed["onExitCodes"]["values"] == [1]


def test_batch_accepts_its_job() -> None:
    job = yaml.safe_load(block("yaml", "logsPolicy"))
    json_format.ParseDict(job, batch_v1.Job.pb(batch_v1.Job()))
    assert job["taskGroups"][0]["taskCount"] == 8
    # Statuses that are not named are tried again, up to maxRetryCount.
    [policy] = job["taskGroups"][0]["taskSpec"]["lifecyclePolicies"]
    assert policy == {"action": "FAIL_TASK", "actionCondition": {"exitCodes": [1]}}


def engine_command(engine: str) -> tuple[str, dict[str, str]]:
    """Returns the shell text that an engine runs, and what it sets for task 3."""
    if engine == "slurm":
        numbers = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
        return block("bash", "#!/bin/bash"), numbers
    if engine == "kubernetes":
        pod = yaml.safe_load(block("yaml", "apiVersion"))["spec"]["template"]["spec"]
        return pod["containers"][0]["command"][2], {"JOB_COMPLETION_INDEX": "3"}
    [group] = yaml.safe_load(block("yaml", "logsPolicy"))["taskGroups"]
    container = group["taskSpec"]["runnables"][0]["container"]
    return container["commands"][1], {"BATCH_TASK_INDEX": "3"}


def make_home(directory: Path, environment_name: str, more: str = "--dry_run") -> Path:
    """Puts a copy of the script, and a Python that only adds a flag, there."""
    programs = directory / environment_name / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "python3"):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} "$@" {more}\n')
        (programs / name).chmod(0o755)
    (programs / "pip").symlink_to("/bin/true")
    (directory / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    return directory


def write_settings(home: Path, bucket: str = "my-bucket") -> None:
    """Writes what step 1 puts into settings.sh."""
    text = here_document(block("bash", "cat > settings.sh"))
    (home / "settings.sh").write_text(text.replace("=my-bucket", f"={bucket}"))


def here_document(text: str) -> str:
    """Returns what a block writes to a file."""
    return text.partition("<<'END'\n")[2].partition("END\n")[0]


def stand_ins(directory: Path, *names: str) -> Path:
    """Makes programs that only note how they were called; see `calls`."""
    programs = directory / "stand_ins"
    programs.mkdir()
    for name in names:
        note = f'echo "{name} $*" >> {programs}/calls\necho stand-in\n'
        (programs / name).write_text(f"#!/bin/sh\n{note}")
        (programs / name).chmod(0o755)
    return programs


def calls(programs: Path) -> list[str]:
    path = programs / "calls"
    return path.read_text().splitlines() if path.exists() else []


def with_path(variables: Mapping[str, str], programs: Path) -> dict[str, str]:
    return {**variables, "PATH": f"{programs}:{os.environ['PATH']}"}


def paste(text: str, cwd: Path, variables: Mapping[str, str]) -> str:
    """Runs a block; `-u` refuses a variable that is not set, such as settings.sh's.

    The `:` keeps bash, which would replace itself by the last command otherwise and
    leave nobody to wait for a program in the background.
    """
    return run_shell(["bash", "-euc", f"{text}\n:"], cwd, variables)


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
