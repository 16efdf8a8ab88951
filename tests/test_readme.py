"""README says what the script does."""

import re

import pytest
from command import REPOSITORY

import imagenet_to_gcs as script

README = REPOSITORY / "README.md"

# Flags of other commands that the guide shows, such as gcloud's; a hyphen tells most.
FOREIGN = {"data_dir", "scopes", "zone", "location", "branch", "user", "recursive"}


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text("utf-8")


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


def test_readme_names_every_flag(readme: str) -> None:
    assert sorted(set(own_flags()) - named_flags(readme)) == []


def test_readme_names_no_flag_that_is_not_there(readme: str) -> None:
    """Among those with an underscore, as all of the script's but one have."""
    unknown = named_flags(readme) - set(own_flags()) - FOREIGN
    assert sorted(name for name in unknown if "_" in name) == []


def test_readme_has_a_row_for_every_flag(readme: str) -> None:
    rows = [line for line in readme.splitlines() if line.startswith("| `--")]
    named = {name for row in rows for name in named_flags(row.split("|")[1])}
    assert sorted(named) == sorted(own_flags())


def test_readme_tells_the_defaults(readme: str) -> None:
    rows = [line for line in readme.splitlines() if line.startswith("| `--")]
    for name in ("training_shards", "validation_shards"):
        [row] = [row for row in rows if name in row.split("|")[1]]
        default = script.FLAGS[name].default
        assert re.search(rf"\b({default}|{default:,})\b", row)


def test_readme_is_short(readme: str) -> None:
    assert len(readme.splitlines()) <= 240


def test_readme_is_held_to_the_manual(readme: str) -> None:
    """What the model is to be given, and the command of the guide."""
    for expected in ("--data_dir", "synset_labels.txt", "validation/", "train/"):
        assert expected in readme


def test_flags_say_what_they_are_for() -> None:
    assert all(own_flags().values())
