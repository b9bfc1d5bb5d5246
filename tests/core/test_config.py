"""Configuration: what a person can get wrong is told in one line; what is right round-trips."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.core.config import (
    apply_overrides,
    config_hash,
    deep_merge,
    describe,
    dump_yaml,
    field,
    parse,
    parse_yaml,
    read_yaml,
    to_dict,
)
from latent_jax.core.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class Ramp:
    kind: Literal["ramp"] = "ramp"
    start: float = field(default=0.0, help="first value")
    end: float = field(default=1.0, help="last value")


@dataclasses.dataclass(frozen=True)
class Delay:
    kind: Literal["delay"] = "delay"
    until: int = field(default=0, ge=0, help="first step")


@dataclasses.dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "lion"] = field(default="adamw", help="update rule")
    lr: float | Ramp | Delay = field(default=1e-3, gt=0, help="learning rate")
    betas: tuple[float, float] = field(default=(0.9, 0.999), ge=0, lt=1)
    clip: float | None = field(default=None, gt=0, help="gradient norm; null: no clipping")


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = field(default=100, gt=0, help="optimizer steps")
    warmup: int = field(default=10, ge=0)
    optimizer: Optim = field(default=Optim())
    phases: tuple[Optim, ...] = ()

    def validate(self) -> None:
        if self.warmup > self.steps:
            raise ConfigError(f"warmup = {self.warmup}: allowed: at most steps = {self.steps}")


@dataclasses.dataclass(frozen=True)
class Run:
    system: str
    name: str = "run"
    out: Path | None = None
    deterministic: bool = False
    ratio: int = field(default=4, choices=(2, 4, 8))
    weights: dict[str, float | Ramp] = field(default_factory=dict, ge=0)
    train: Train = field(default_factory=Train)


@dataclasses.dataclass(frozen=True)
class Wide(Run):
    extra: int | Literal["auto"] | None = "auto"


def build(*overrides: str, cls: Any = Run) -> Any:
    return parse(cls, apply_overrides({"system": "s"}, overrides))


def test_defaults_and_nesting() -> None:
    cfg = build("train.steps=200", "train.optimizer.lr=3e-4", "weights.ae=2", "out=runs/a")
    assert cfg.train.steps == 200 and cfg.train.optimizer.lr == 3e-4
    assert cfg.weights == {"ae": 2.0} and isinstance(cfg.weights["ae"], float)
    assert cfg.out == Path("runs/a") and cfg.train.optimizer.betas == (0.9, 0.999)
    assert parse(Run, {"system": "s", "train": None}) == Run("s")


def test_union_is_chosen_by_kind_of_value() -> None:
    assert build("train.optimizer.lr={kind: delay, until: 5}").train.optimizer.lr == Delay(until=5)
    assert build("train.optimizer.lr={end: 0.5}").train.optimizer.lr == Ramp(end=0.5)
    assert build("train.optimizer.lr={until: 7}").train.optimizer.lr == Delay(until=7)
    assert build("train.optimizer.clip=null").train.optimizer.clip is None
    assert build("weights={ae: 1, kl: {end: 2}}").weights == {"ae": 1.0, "kl": Ramp(end=2.0)}
    for text, value in (("auto", "auto"), ("3", 3), ("null", None)):
        assert build(f"extra={text}", cls=Wide).extra == value


def test_subclass_keeps_the_fields_of_its_base() -> None:
    assert build("train.steps=20", "extra=1", cls=Wide) == Wide("s", train=Train(steps=20), extra=1)


def test_sequences_of_sections() -> None:
    cfg = build("train.phases=[{lr: 0.1}, {name: lion}]")
    assert cfg.train.phases == (Optim(lr=0.1), Optim(name="lion"))
    with pytest.raises(ConfigError, match=r"train\.phases\.1\.lr = -1\.0: out of range"):
        build("train.phases=[{}, {lr: -1}]")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stpes=3", ("train.stpes = 3", "unknown key", "'steps'", "warmup")),
        ("steps=3", ("steps = 3", "'train.steps'")),
        ("train.steps=many", ("train.steps = 'many'", "is text", "allowed: int > 0")),
        ("train.steps=1.5", ("train.steps = 1.5", "is a number", "int > 0")),
        ("train.steps=true", ("train.steps = true", "int")),
        ("train.steps=0", ("train.steps = 0", "out of range", "int > 0")),
        ("train=3", ("train = 3", "a mapping with the keys steps")),
        ("train.optimizer.name=adam", ("train.optimizer.name = 'adam'", "'adamw'", "adamw | lion")),
        ("train.optimizer.lr=fast", ("train.optimizer.lr = 'fast'", "float | {kind, start, end}")),
        ("train.optimizer.lr={end: x}", ("train.optimizer.lr.end = 'x'", "float")),
        (
            "train.optimizer.lr={kind: rmap}",
            ("train.optimizer.lr.kind = 'rmap'", "'ramp'", "ramp, delay"),
        ),
        ("train.optimizer.betas=[0.9]", ("train.optimizer.betas = [0.9]", "1 items")),
        ("train.optimizer.betas=[0.9, 1.0]", ("train.optimizer.betas.1 = 1.0", "< 1")),
        ("train.optimizer.betas=0.9,0.99", ("write a list: [0.9,0.99]",)),
        ("train.warmup=1000", ("train: warmup = 1000", "at most steps = 100")),
        ("ratio=3", ("ratio = 3", "allowed: 2, 4, 8")),
        ("weights.ae=-1", ("weights.ae = -1.0", ">= 0")),
        ("weights.ae=.nan", ("weights.ae", "nan")),
        ("system=3", ("system = 3", "put it in quotes: '3'")),
        ("deterministic=yes", ("deterministic = 'yes'", "true | false")),
        ("system=null", ("system = None", "is empty", "text")),
    ],
)
def test_a_mistake_is_one_clear_line(override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(override)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 2 and isinstance(caught.value, UserError)
    for part in parts:
        assert part in text, text


def test_missing_required_key() -> None:
    with pytest.raises(ConfigError, match="system: missing; give it text"):
        parse(Run, {})


def test_where_prefixes_every_path() -> None:
    with pytest.raises(ConfigError, match=r"^a\.b\.steps = 'x'"):
        parse(Train, {"steps": "x"}, where="a.b")
    with pytest.raises(ConfigError, match=r"^a\.b: warmup = 20"):
        parse(Train, {"steps": 2, "warmup": 20}, where="a.b")


def test_yaml_numbers_booleans_and_duplicates(tmp_path: Path) -> None:
    tree = parse_yaml("a: 1e-3\nb: on\nc: 1.5\nd: 2024-01-01\ne: true\nf: 1_000\ng: -3E+2", "x")
    assert tree == {
        "a": 1e-3, "b": "on", "c": 1.5, "d": "2024-01-01", "e": True, "f": 1000, "g": -300.0
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text("a: 1\nb:\n  c: 1\n  c: 2\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:4:3: not valid YAML: key 'c' is given twice"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a: [1, 2", r"bad\.yaml:\d+:\d+: not valid YAML"),
        (b"- 1\n- 2\n", "top level is a list"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"extends: 3\n", "extends = \\[?3"),
        (b"extends: bad.yaml\n", "circle"),
        (b"extends: none.yaml\n", r"none\.yaml: no such config file"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=match) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"no such config file; did you mean 'tiny\.yaml'"):
        read_yaml(tmp_path / "tinny.yaml")
    with pytest.raises(ConfigError, match="no folder"):
        read_yaml(tmp_path / "nowhere" / "a.yaml")


def test_extends_merges_deeply_and_relatively(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.yaml").write_text("t: {x: 1, y: 2}\nl: [1, 2]\ns: {kind: ramp, end: 3}")
    (tmp_path / "base" / "b.yaml").write_text("extends: a.yaml\nt: {y: 3}\n")
    (tmp_path / "c.yaml").write_text(
        "extends: [base/b.yaml]\nt: {z: 4}\nl: [9]\ns: {kind: delay, until: 1}"
    )
    assert read_yaml(tmp_path / "c.yaml") == {
        "t": {"x": 1, "y": 3, "z": 4}, "l": [9], "s": {"kind": "delay", "until": 1}
    }  # fmt: skip


def test_overrides() -> None:
    base = {"a": {"b": [1, 2]}, "s": 1.0}
    assert apply_overrides(base, ["a.b.1=5", "s.kind=ramp", "x.y.z=[1]", "e="]) == {
        "a": {"b": [1, 5]}, "s": {"kind": "ramp"}, "x": {"y": {"z": [1]}}, "e": None
    }  # fmt: skip
    assert base == {"a": {"b": [1, 2]}, "s": 1.0}
    assert apply_overrides({}, {"a.b": (1,)}) == {"a": {"b": (1,)}}
    for bad in ("train.steps", "=3", "a..b=1", "a.b={", "a.b.7=1", "a.b.x=1"):
        with pytest.raises(ConfigError, match="override"):
            apply_overrides(base, [bad])


def test_hash_ignores_what_does_not_matter() -> None:
    cfg = build()
    assert len(config_hash(cfg)) == 12
    assert config_hash(cfg) == config_hash(build("name=other", "out=elsewhere"))
    assert config_hash(cfg) != config_hash(build("train.steps=101"))
    other = build("train.steps=101")
    assert config_hash(cfg, ("train.steps",)) == config_hash(other, ("train.steps",))
    assert config_hash(to_dict(cfg)) == config_hash(cfg)


def test_describe_lists_every_setting() -> None:
    rows = {path: (kind, value, text) for path, kind, value, text in describe(Run)}
    assert rows["system"][1] == "required"
    assert rows["train.steps"] == ("int > 0", 100, "optimizer steps")
    assert rows["train.optimizer.betas"][0] == "[float, float] >= 0 and < 1"
    filled = {path: value for path, _, value, _ in describe(build("train.optimizer.lr={end: 2}"))}
    assert filled["system"] == "s" and filled["train.optimizer.lr.end"] == 2.0


_names = st.text("abcdefgh_", min_size=1, max_size=6)
_runs = st.builds(
    Run,
    system=st.text(max_size=8),
    name=st.sampled_from(["1e3", "true", "null", "~", "on", "a: b", "- x", "", "é", "0x1", "1_0"]),
    out=st.none() | st.builds(Path, _names),
    deterministic=st.booleans(),
    ratio=st.sampled_from([2, 4, 8]),
    weights=st.dictionaries(
        _names, st.floats(0, allow_nan=False) | st.builds(Ramp, end=st.floats(-1e6, 1e6))
    ),
    train=st.builds(
        Train,
        steps=st.integers(10, 10**9),
        phases=st.lists(st.builds(Optim, lr=st.floats(1e-300, 1e300)), max_size=2).map(tuple),
    ),
)


@given(_runs)
def test_any_config_survives_yaml(run: Run) -> None:
    text = dump_yaml(to_dict(run))
    again = parse(Run, parse_yaml(text, "dump"))
    assert again == run
    assert config_hash(again) == config_hash(run)
    assert yaml.safe_load(text) is not None


_trees = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(_names, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_names, _trees, max_size=3), st.dictionaries(_names, _trees, max_size=3))
def test_deep_merge_laws(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert deep_merge(a, {}) == a and deep_merge({}, b) == b and deep_merge(a, a) == a
    assert deep_merge(deep_merge(a, b), b) == deep_merge(a, b)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_names, inner, max_size=2),
        max_leaves=5,
    ),
    st.sampled_from(["train", "train.steps", "train.optimizer.lr", "weights", "ratio", "zzz"]),
)
def test_any_value_is_accepted_or_one_line(value: Any, path: str) -> None:
    try:
        cfg = parse(Run, apply_overrides({"system": "s"}, {path: value}))
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith(path.split(".")[0])
    else:
        assert path != "zzz" and not math.isnan(cfg.train.steps)
