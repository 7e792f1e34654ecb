"""Everything public is behind one import name."""

import pytest

import quantpress
from quantpress import errors

ERRORS = sorted(n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception))

# What quantpress promises. A name that goes from here breaks somebody's program: say so in CHANGELOG.md.
PUBLIC = sorted(
    [
        *ERRORS,
        "CachedContext",
        "Compose",
        "ContextStore",
        "PackedLayer",
        "PagedAttention",
        "TextGenerationPipeline",
        "TurboQuant",
        "TurboQuantCodec",
        "attention_fidelity",
        "cache_memory",
        "captured_decoding",
        "continue_inputs",
        "disable",
        "enable",
        "patch_attention",
    ]
)


def test_public_names_are_locked_and_sorted() -> None:
    assert quantpress.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name: str) -> None:
    assert getattr(quantpress, name).__name__ == name
    assert name in dir(quantpress)


def test_every_press_can_be_imported_from_the_top() -> None:
    from quantpress import presses

    assert presses.__all__ == sorted(presses.__all__)
    assert {"SnapKV", "StreamingLLM"} <= set(presses.__all__)
    for name in presses.__all__:
        assert getattr(quantpress, name) is getattr(presses, name)
        assert name in dir(quantpress)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SnapKVPress", "; it is quantpress.SnapKV here, and kvpress.SnapKVPress in kvpress"),
        ("BasePress", "; it is kvpress.BasePress"),
        ("SnapVK", "; did you mean 'SnapKV'"),
        ("enabel", "; did you mean 'enable'"),
        ("NothingOfThatKind", ""),
        ("__wrapped__", ""),
    ],
)
def test_unknown_name_is_an_error_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=f"'quantpress' has no attribute '{name}'{hint}"):
        getattr(quantpress, name)
    with pytest.raises(ImportError, match=f"cannot import name '{name}' from 'quantpress'{hint}"):
        exec(f"from quantpress import {name}")


@pytest.mark.parametrize("package", ["presses", "pipelines"])
def test_packages_hint_too(package: str) -> None:
    with pytest.raises(ImportError, match="did you mean"):
        exec(f"from quantpress.{package} import {'SnapVK' if package == 'presses' else 'enabel'}")


def test_every_error_is_a_quantpress_error() -> None:
    assert all(issubclass(getattr(errors, name), errors.QuantPressError) for name in ERRORS)
