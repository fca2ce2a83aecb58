"""Wrong options of the benchmarks: a sentence, never a traceback, and nothing that is measured by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    attention,
    baseline,
    compare_ort,
    decode_loop,
    dispatch,
    gemm,
    loading,
    peer_models,
    projections,
    sessions,
)
from tests.harness import device


def words(text: str) -> list[str]:
    return text.split()


QUICK = words("--samples 2 --warm-up 0.01 --pass-ms 0.1 --baseline-bytes 200000 --matrix-size 16 --rotate-bytes 60000")
HEADS = words("--decode --past 9 --heads 4 --kv-heads 2 --head-size 16")
TINY = words("--layers 1 --dim 32 --heads 4 --kv-heads 2 --head-size 8 --ffn 32 --vocabulary 50 --capacity 16")


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (baseline.main, "--samples 0", "from 1 to 2,048"),
        (baseline.main, "--samples 2049", "from 1 to 2,048"),
        (baseline.main, "--pass-ms nan", "no number of at least 0"),
        (baseline.main, "--warm-up -1", "no number of at least 0"),
        (baseline.main, "--baseline-bytes 0", "of at least 1"),
        (baseline.main, "--matrix-size 0", "of at least 1"),
        (baseline.main, "--rotate-bytes -1", "of at least 0"),
        (attention.main, "--decode --heads 0", "of at least 1"),
        (attention.main, "--decode --kv-heads 0", "of at least 1"),
        (attention.main, "--decode --head-size 0", "of at least 1"),
        (attention.main, "--decode --batch 0", "of at least 1"),
        (attention.main, "--decode --layers x", "of at least 0"),
        (attention.main, "--decode --layers -1", "of at least 0"),
        (attention.main, "--decode --rows 1,0", "of at least 1"),
        (attention.main, "--decode --past 1,x", "'x' is no integer of at least 0"),
        (compare_ort.main, "--decode --ort-option bad", "NAME=VALUE"),
        (dispatch.main, "--count 0", "of at least 1"),
        (decode_loop.main, "--steps 0", "of at least 1"),
        (decode_loop.main, "--past -1", "of at least 0"),
        (attention.main, "--decode --routes nonsense", "unknown routes"),
        (decode_loop.main, "--dim 0", "of at least 1"),
        (decode_loop.main, "--dtype f99", "invalid choice"),
        (decode_loop.main, "--weights 3bit", "invalid choice"),
        (gemm.main, "--inputs -64", "of at least 1"),
        (projections.main, "--divide 0", "of at least 1"),
        (projections.main, "--only nonsense", "unknown projections"),
        (loading.main, "--bytes 0", "of at least 1"),
        (loading.main, "--runs 0", "of at least 1"),
        (sessions.main, "x.pte --together 0", "of at least 1"),
        (sessions.main, "x.pte --generators 0", "of at least 1"),
        (sessions.main, "x.pte --prompt a,b", "of at least 0"),
        (peer_models.main, "gguf x --context 0", "from 1 to 4,294,967,295"),
        (peer_models.main, "gguf x --context 4294967296", "from 1 to 4,294,967,295"),
    ],
)
def test_a_wrong_number_is_refused(main: Any, options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words(options))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (attention.main, ["--decode", "--adapter", "nonsense"], "no adapter's name contains 'nonsense'"),
        (dispatch.main, ["--adapter", "nonsense"], "no adapter's name contains 'nonsense'"),
        (decode_loop.main, [*TINY, "--heads", "3", *QUICK], "3 query heads are no multiple of 2 KV heads"),
        (decode_loop.main, [*TINY, "--weights", "4bit", "--ffn", "40", *QUICK], "multiples of 32, got 40"),
        (decode_loop.main, ["--pte", "nonsense.pte", *QUICK], "No such file"),
        (loading.main, ["--program", "nonsense.pte"], "No such file"),
        (sessions.main, ["nonsense.pte"], "No such file"),
        (gemm.main, ["--rows", "2", "--inputs", "33", "--dtype", "4bit", *QUICK], "multiple of 32 inputs, got 33"),
        (attention.main, [*HEADS, "--route", "stream", "--variant", "nonsense", *QUICK], "variant is 'nonsense'"),
        (attention.main, [*HEADS, "--route", "stream", "--variant", "lanes=48", *QUICK], "variant is 'lanes=48'"),
    ],
)
def test_what_cannot_be_measured_is_said(
    main: Any, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_a_matrix_whose_sums_no_buffer_holds(capsys: pytest.CaptureFixture[str]) -> None:
    size = device("full").limits.max_binding // 1024 + 1
    assert attention.main([*HEADS, *QUICK, "--matrix-size", str(size)]) == 1
    printed = capsys.readouterr()
    assert f"fma needs a buffer of {size * 1024:,} bytes, but this device binds at most" in printed.err
    assert printed.out == ""


def test_the_file_for_the_lines_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert baseline.main([*QUICK, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert str(tmp_path) in printed.err
    assert printed.out == ""
