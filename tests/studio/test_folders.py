"""What a browser names stays in the folders that were given."""

import pytest

from qwen_lit.errors import UserError
from qwen_lit.studio.folders import Folders


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (tmp_path / "given" / "rows.jsonl").write_text("{}\n")
    return Folders([str(tmp_path / "given")])


def test_what_is_inside_is_found_by_its_relative_and_its_whole_path(folders):
    whole = folders.roots[0] / "rows.jsonl"
    assert folders.file("rows.jsonl") == folders.file(str(whole)) == folders.file("a/../rows.jsonl") == whole


@pytest.mark.parametrize(
    "given", ["../secret.jsonl", "/etc/passwd", "~/x", "link", "link/secret.jsonl", "", " ", "a\0b", "../given2"]
)
def test_what_leads_out_is_refused(folders, given):
    (folders.roots[0] / "link").symlink_to(folders.roots[0].parent)
    (folders.roots[0].parent / "given2").mkdir()
    with pytest.raises(UserError):
        folders.inside(given)


@pytest.mark.parametrize("given", ["../given2", "/etc", "missing", "", "Qwen/../../x", "-x/y"])
def test_a_model_is_a_folder_inside_or_a_name_of_the_hub(folders, given):
    with pytest.raises(UserError):
        folders.model(given)


def test_a_model_is_found_in_a_folder(folders):
    home = folders.roots[0] / "some" / "model"
    home.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json"):
        (home / name).write_text("{}")
    assert folders.models() == [str(home)]
    assert folders.model("some/model") == str(home)
    assert folders.model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    "name", ["../../x.jsonl", "/etc/x.jsonl", "..\\x.jsonl", ".x.jsonl", "<img src=x>.jsonl", "a\nb.jsonl"]
)
def test_a_dropped_file_is_kept_among_the_uploads(folders, name):
    path = folders.free_file(name)
    assert path.parent == folders.home / "uploads" and path.name.endswith(".jsonl") and "<" not in path.name


def test_a_dropped_file_never_replaces_another(folders):
    first = folders.free_file("x.jsonl")
    first.write_text("")
    assert folders.free_file("x.jsonl").name == "x-2.jsonl"
    with pytest.raises(UserError, match="no file of rows"):
        folders.free_file("x.py")


def test_a_home_that_is_a_link_outwards_is_refused(folders):
    (folders.roots[0] / ".qwen_lit_studio").symlink_to(folders.roots[0].parent)
    with pytest.raises(UserError, match="outside"):
        _ = folders.home
