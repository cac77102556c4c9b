"""An option that would do nothing is refused by name, and accepted with the option that gives it a meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pixtral_cli.main import COMMANDS, app, application
from pixtral_cli.options import UNREAD, ThreadsOption, refuse_unused, warn_of_unused
from pixtral_runtime.backends.choose import BACKENDS
from pixtral_runtime.bundle.manifest import MANIFEST

UNUSED = "would do nothing"
NOBODY = "http://127.0.0.1:9/v1"


def invoke(*arguments: str, commands: typer.Typer = app) -> Any:
    return CliRunner().invoke(commands, list(arguments))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run. Its bundle is empty: options are looked at before it is opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_text("{}")
    (tmp_path / "asked.jsonl").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "option", "reason", "useful"),
    [
        ("run bundle --requests asked.jsonl", "-p What?", "with --requests", "run bundle a.png"),
        ("run bundle --requests asked.jsonl", "--recursive", "with --requests", "run bundle photos"),
        ("run bundle a.png", "--ray-workers 2", "without --ray", "run bundle a.png --ray local"),
        ("run bundle a.png", "--force", "without --output", "run bundle a.png -o r.jsonl"),
        ("run bundle a.png", "--sidecar-dir new", "without --sidecar", "run bundle a.png --sidecar .txt"),
        ("run bundle a.png", "--existing skip", "without --sidecar", "run bundle a.png --sidecar .txt"),
        ("run bundle a.png", "--prefix TOK", "without --sidecar", "run bundle a.png --sidecar .txt"),
        ("run bundle a.png", "--suffix !", "without --sidecar", "run bundle a.png --sidecar .txt"),
        ("run bundle a.png", "--as-written", "without --sidecar", "run bundle a.png --sidecar .txt"),
        ("run bundle a.png -o r.jsonl --resume", "--force", "with --resume", "run bundle a.png -o r.jsonl"),
        ("run bundle a.png -o r.jsonl", "--embed", "without --format parquet", "run bundle a.png --format parquet"),
        ("run bundle a.png --backend rtx", "--threads 4", "with --backend rtx", "run bundle a.png"),
        ("run bundle a.png --backend trt", "--threads 0", "with --backend trt", "run bundle a.png --backend ort-cpu"),
        ("run bundle a.png --backend rtx", "--drafts 4", "with --backend rtx", "run bundle a.png --backend ort-cpu"),
        ("run bundle a.png --backend trt", "--memory-limit 8GB", "with --backend trt", "run bundle a.png --batch 2"),
        ("run bundle a.png --backend ort-cuda", "--threads 4", "with --backend ort-cuda", "run bundle a.png"),
        ("run bundle a.png --backend ort-cpu", "--device 0", "with --backend ort-cpu", "run bundle a.png"),
        ("ask bundle", "--max-image-side 64", "without an image", "ask bundle a.png"),
        ("ask bundle", "--image-tokens 64", "without an image", "ask bundle a.png"),
        ("ask bundle", "--preprocess hf", "without an image", "ask bundle a.png"),
        ("ask bundle", "--no-exif", "without an image", "ask bundle a.png"),
        ("ask bundle --backend rtx", "--threads 4", "with --backend rtx", "ask bundle"),
        ("bench bundle --images photos", "--image-side 64", "with --images", "bench bundle"),
        ("bench bundle --mode serve", "--runs 3", "with --mode serve", "bench bundle"),
        ("bench bundle --mode serve", "--warmup 0", "with --mode serve", "bench bundle --mode throughput"),
        ("bench bundle --mode serve", "--min-seconds 3", "with --mode serve", "bench bundle"),
        ("bench bundle --mode throughput", "--min-seconds 3", "with --mode throughput", "bench bundle"),
        ("bench bundle", "--request-rate 2", "with --mode latency", "bench bundle --mode serve"),
        ("bench bundle", "--threshold 2", "without --compare", "bench bundle --compare old.json"),
        ("bench bundle --json", "--format md", "with --json", "bench bundle"),
        ("bench bundle --backend trt", "--threads 2", "with --backend trt", "bench bundle"),
        ("bench bundle", "--model m", "without --url", f"bench --url {NOBODY}"),
        ("bench bundle", "--seed 1", "without --url", f"bench --model m --url {NOBODY}"),
        (f"bench --model m --url {NOBODY}", "--threads 2", "with --url", "bench bundle"),
        (f"bench --model m --url {NOBODY}", "--backend ort-cpu", "with --url", "bench bundle"),
        (f"bench --model m --url {NOBODY}", "--batch 2", "with --url and --mode latency",
         f"bench --model m --mode throughput --url {NOBODY}"),
        (f"bench --model m --mode serve --url {NOBODY}", "--batch 2", "with --url and --mode serve",
         "bench bundle --mode serve"),
        (f"bench --model m --mode serve --url {NOBODY}", "--runs 3", "with --mode serve",
         f"bench --model m --url {NOBODY}"),
        (f"bench --model m --url {NOBODY}", "--min-seconds 3", "with --url and --mode latency",
         f"bench --model m --mode serve --url {NOBODY}"),
        ("eval bundle --task easy_vqa", "--force", "without --save", "eval bundle --task easy_vqa --save s.json"),
        ("eval bundle --task easy_vqa --save s.json --resume", "--force", "with --resume",
         "eval bundle --task easy_vqa --save s.json"),
        ("eval bundle --task mm_mt_bench --save s.json", "--judge-model m", "without --judge-url",
         "eval bundle --task mm_mt_bench --save s.json --data nowhere --judge-url http://127.0.0.1:9/v1"),
        ("eval bundle --task easy_vqa --backend rtx", "--threads 2", "with --backend rtx",
         "eval bundle --task easy_vqa --data nowhere"),
        ("eval bundle --task easy_vqa --backend rtx", "--memory-limit 8GB", "with --backend rtx",
         "eval bundle --task easy_vqa --data nowhere"),
        ("eval bundle --task gsm8k --data nowhere", "--image-tokens 64", "with gsm8k, which has no pictures",
         "eval bundle --task easy_vqa --data nowhere"),
        ("eval bundle --task mmlu --data nowhere", "--max-new-tokens 4", "with mmlu, which is read and not answered",
         "eval bundle --task gsm8k --data nowhere"),
        ("eval bundle --task mmlu --data nowhere", "--window 64", "with mmlu",
         "eval bundle --task perplexity --data nowhere"),
        ("eval bundle --task math --data nowhere", "--shots 4", "with math", "eval bundle --task mmlu --data nowhere"),
        ("tune bundle --images photos --questions q.txt", "--force", "without --output",
         "tune bundle --images photos --questions q.txt -o tuning"),
        ("tune bundle --images photos --questions q.txt -o tuning --resume", "--force", "with --resume",
         "tune bundle --images photos --questions q.txt -o tuning"),
        ("tune bundle --images photos --questions q.txt", "--precision int4", "without a checkpoint to export",
         "tune nowhere --images photos --questions q.txt -o tuning"),
        ("tune bundle --images photos --questions q.txt", "--kv-cache int8", "without a checkpoint to export",
         "tune nowhere --images photos --questions q.txt -o tuning"),
        ("tune bundle --images photos --questions q.txt", "--max-context 64", "without a checkpoint to export",
         "tune nowhere --images photos --questions q.txt -o tuning"),
        ("tune bundle --images photos --questions q.txt", "--calibration c", "without a checkpoint to export",
         "tune nowhere --images photos --questions q.txt -o tuning"),
        ("tune bundle --images photos --questions q.txt", "--calibration-samples 2", "without a checkpoint to export",
         "tune nowhere --images photos --questions q.txt -o tuning"),
        ("tune bundle --images photos --questions q.txt --backend rtx", "--threads 2", "with --backend rtx",
         "tune bundle --images photos --questions q.txt"),
        ("compare bundle other", "--max-image-side 64", "without --images", "compare bundle other --images photos"),
        ("compare bundle other", "--image-tokens 64", "without --images", "compare bundle other --images photos"),
        ("compare bundle other", "--no-exif", "without --images", "compare bundle other --images photos"),
        ("compare bundle bundle --texts asked.jsonl", "--max-new-tokens 4", "with --texts alone",
         "compare bundle bundle"),
        ("compare bundle other", "--force", "without --html", "compare bundle other --html page.html"),
        ("check bundle --engine rtx:sm89", "--backend ort-cpu", "without --golden", "check bundle --golden nowhere"),
        ("check bundle --golden nowhere --backend rtx", "--threads 2", "with --backend rtx",
         "check bundle --golden nowhere --backend ort-cpu"),
        ("check bundle --engine rtx:sm89", "--threads 2", "without --against", "check bundle --against nowhere"),
        ("check bundle --engine rtx:sm89", "--lora a", "without --against", "check bundle --against nowhere"),
        ("build bundle --target rtx:sm89,rtx:sm120", "--timing-cache t", "for rtx:sm89,rtx:sm120",
         "build bundle --target rtx:sm89,trt"),
        ("serve bundle", "--max-batch-file 1MB", "without --batch-api-dir", "serve bundle --batch-api-dir kept"),
        ("verify bundle --certify", "--batch 2", "with --certify", "verify bundle"),
        ("verify bundle --certify", "--backend ort-cpu", "with --certify", "verify bundle"),
        ("verify bundle --backend rtx", "--threads 2", "with --backend rtx", "verify bundle --backend ort-cpu"),
        ("plan bundle", "--dtype float16", "for a bundle", "plan nowhere"),
        ("plan bundle", "--group-size 32", "for a bundle", "plan nowhere --precision int4"),
        ("plan bundle", "--lora a", "for a bundle", "plan nowhere"),
        ("plan bundle", "--method rtn", "for a bundle", "plan nowhere --precision int4"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused_by_name(
    command: str, option: str, reason: str, useful: str, folder: Path
) -> None:
    refused = invoke(*command.split(), *option.split())
    typed = option.split(maxsplit=1)[0]
    name = {"-p": "--prompt", "--no-exif": "--exif/--no-exif"}.get(typed, typed)
    assert refused.exit_code == 3, refused.stderr
    assert f"error: {name} {UNUSED} {reason}" in refused.stderr
    assert f"leave {name} away" in refused.stderr.splitlines()[-1]
    for accepted in (command.split(), [*useful.split(), *option.split()]):
        done = invoke(*accepted)
        assert UNUSED not in done.stderr
        assert done.exit_code in (3, 4), done.stderr  # for the empty bundle, or what this machine lacks


@pytest.mark.parametrize(
    "command",
    [  # these do nothing this time, and the user still gets what was asked for
        "run bundle a.png --seed 3 --top-p 0.9",  # an answer at temperature 0 is the likeliest, whatever the seed
        "run bundle a.png -o r.jsonl --force",  # there is nothing to replace
        "run bundle --requests asked.jsonl --system Short. --max-new-tokens 3",  # for lines without their own
        "export nowhere -o b --dry-run --force --build rtx:sm89",  # the whole command, looked at first
        "build bundle --target rtx:sm89 --dry-run --opt-level 3 --compat trt10.3",
        "bench bundle --json --format json",
        "run bundle a.png --batch 2 --memory-limit 8GB",  # refused where two answers do not fit
        "compare bundle other --limit 3",  # of prompts alone
    ],
)
def test_harmless_options_are_accepted(command: str, folder: Path) -> None:
    assert UNUSED not in invoke(*command.split()).stderr


def test_options_that_a_backend_does_not_read_are_named_where_auto_took_it() -> None:
    def work(context: typer.Context, backend: str, threads: ThreadsOption = 0) -> None:
        warn_of_unused(context, backend)

    commands = application([(work, "Example: pixtral work")])
    for backend, option, is_warned in (
        ("rtx: engines for rtx:sm89", ["--threads", "2"], True),
        ("rtx: engines for rtx:sm89", [], False),
        ("ort-cuda: asked for", ["--threads", "2"], True),
        ("ort-cpu: the bundle lists no engines", ["--threads", "2"], False),
    ):
        done = invoke("work", backend, *option, commands=commands)
        assert done.exit_code == 0
        whom = "ort-cuda" if backend.startswith("ort-cuda") else "engines"
        assert (f"--threads does nothing with {whom}" in done.stderr) == is_warned


def test_names_of_parameters_in_these_checks_exist() -> None:
    """A name that no command has would switch a check off."""
    known = set().union(*(function.__annotations__ for function, _ in COMMANDS))
    assert set().union(*UNREAD.values()) <= known and set(UNREAD) == set(BACKENDS) - {"auto"}


def test_a_check_for_a_parameter_that_does_not_exist_is_a_bug() -> None:
    def work(context: typer.Context, threads: ThreadsOption = 0) -> None:
        refuse_unused(context, ("thread",), "ever")

    assert invoke("work", commands=application([(work, "Example: pixtral work")])).exit_code == 1
