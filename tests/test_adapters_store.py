"""The store of adapters, and names of stacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomoat.adapters import store
from nomoat.adapters.package import save_adapter
from nomoat.adapters.stack import open_stack, parse_model_name
from nomoat.errors import AdapterError, InputError, NotFoundError
from toy import fingerprint, random_adapter, toy_spec

SPEC = toy_spec()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "con",
        "nul.txt",
        "COM1",
        "a/b",
        "a\\b",
        "Tickets",
        "-a",
        "a-",
        "a+b",
        "a@1",
        "x" * 65,
        "ü",
        "аdmin",
        "a\n",
        "‮a",
    ],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        store.check_name(name)
    assert caught.value.code == "E_PATH"


@pytest.mark.parametrize("name", ["a", "tickets", "sql-2", "v1.0_b", "x" * 64, "console"])
def test_names_that_are_allowed(name: str) -> None:
    assert store.check_name(name) == name


def test_install_list_resolve_remove(home: Path) -> None:
    assert store.installed() == []
    with pytest.raises(NotFoundError, match="installed: none"):
        store.resolve("tickets")
    for name in ("tickets", "polite"):
        save_adapter(store.folder(name), random_adapter(SPEC, 1), SPEC, {"recipe": {"of": name}})
    (store.folder("polite") / "nomoat.json").write_text("{")
    (home / "data" / "adapters" / ".tickets.1-00000000.tmp").mkdir()
    found = store.installed()
    assert [(entry.name, entry.manifest.get("recipe")) for entry in found] == [("polite", None), ("tickets", {"of": "tickets"})]
    assert found[0].fault is not None
    assert store.resolve("tickets") == store.folder("tickets")
    store.remove("tickets")
    with pytest.raises(NotFoundError, match="installed: polite"):
        store.resolve("tickets")
    with pytest.raises(NotFoundError):
        store.remove("tickets")
    with pytest.raises(NotFoundError):
        store.resolve("./tickets")


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("smollm2:135m", ("smollm2:135m", [])),
        ("smollm2:135m+tickets@0.8+polite", ("smollm2:135m", [("tickets", 0.8), ("polite", 1.0)])),
        ("hf:org/repo+a@-0.5", ("hf:org/repo", [("a", -0.5)])),
        ("m+./x/y@2", ("m", [("./x/y", 2.0)])),
        ("m+a@1e-1", ("m", [("a", 0.1)])),
    ],
)
def test_names_of_stacks(name: str, parsed: tuple[str, list[tuple[str, float]]]) -> None:
    assert parse_model_name(name) == parsed


@pytest.mark.parametrize("name", ["", "+a", "m+", "m++a", "m+a@", "m+a@x", "m+a@nan", "m+a@inf", "m+@1"])
def test_names_of_stacks_that_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        parse_model_name(name)


def test_paths_that_exist_may_hold_the_signs(tmp_path: Path) -> None:
    model, adapter = tmp_path / "a+b@1.gguf", tmp_path / "c+d@2"
    model.touch()
    adapter.mkdir()
    assert parse_model_name(f"{model}+{adapter}") == (str(model), [(str(adapter), 1.0)])
    assert parse_model_name(f"{model}+{adapter}@0.5+x") == (str(model), [(str(adapter), 0.5), ("x", 1.0)])


def test_open_stack_checks_the_base() -> None:
    base = fingerprint(SPEC)
    for seed, name in enumerate(("tickets", "polite")):
        save_adapter(store.folder(name), random_adapter(SPEC, seed), SPEC, {"base": base})
    assert open_stack("m", SPEC) is None
    stack = open_stack("m+tickets@0.8+polite", SPEC, base=base)
    assert stack is not None
    assert [weight for _, weight in stack.adapters] == [0.8, 1.0]
    assert stack.rank == 8
    with pytest.raises(AdapterError, match="vocabulary"):
        open_stack("m+tickets", SPEC, base=base | {"vocabulary": "w"})
