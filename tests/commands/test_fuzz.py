"""Whatever is typed and whatever a file holds: an answer, or one line and exit code 2, never a traceback.

FUZZ_TRIES=2000 pytest tests/commands/test_fuzz.py runs that many random tries of each test.
"""

import gzip
import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from click.testing import CliRunner, Result
from fuzzing import QUICK, arguments, bounded, command_line, json_file, mangled, mutated, tries, write_folder
from helpers import OWN_DEVICE, QWEN, SMALL
from hypothesis import event, given
from hypothesis import strategies as st
from made_up_node import cpu_node
from records_by_hand import written

from perfmodel.cli import main
from perfmodel.commands.validate import validate
from perfmodel.devices import own, profile
from perfmodel.errors import UserError
from perfmodel.methods.parts.peft_adapter import PeftAdapter
from perfmodel.recording import files
from perfmodel.resources import DATA
from validate.campaign.plan import load_plan
from validate.measuring import cells
from validate.published import layers, tuners
from validate.published import steps as published

CONFIGS = Path(__file__).parents[1] / "configs"
HOST = (DATA / "hosts" / "epyc-genoa.toml").read_text()
SETUP = ["--batch", "2", "--seq", "16", "--device", "l40s"]


@pytest.fixture
def folder(no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with small models and configs; the hub cannot be reached."""
    write_folder(tmp_path, {**SMALL, "qwen": QWEN}, CONFIGS, OWN_DEVICE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ends_well(args: list[str], also: tuple[int, ...] = ()) -> Result:
    """Run a command line: exit code 0 (or one that it has `also`), or 2 with one line of complaint."""
    with bounded():
        result = CliRunner().invoke(main, args)
    shown = f"{args}\n{result.output[-2000:]}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(shown) from result.exception
    assert result.exit_code in (0, 2, *also), shown
    if result.exit_code == 2:
        complaints = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
        assert len(complaints) == 1, shown
        assert complaints[0].startswith("perfmodel: "), shown
        assert len(complaints[0]) < 1000, shown
    if result.exit_code == 0 and "--json" in args and "--help" not in args:
        json.loads(result.stdout, parse_constant=refuse)
    return result


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


SEARCHES = ("advise", "explain", "report")  # predict dozens of setups


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", QUICK)
def test_any_command_line_ends_in_an_answer_or_one_line(command: str) -> None:
    """Option values in any combination, in any order, with what typing errors make of them."""

    @tries(8 if command in SEARCHES else 25)
    @given(command_line(command))
    def check(args: list[str]) -> None:
        result = ends_well([command, *args])
        event(f"exit code {result.exit_code}")

    check()


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize("command", ["check", "profile"])
def test_any_command_line_that_reads_measurements(command: str) -> None:
    """Those that measure take minutes; a check that fails ends with 1."""
    Path("trace.json.gz").write_bytes(TRACES[0].read_bytes())

    @tries(15)
    @given(arguments(validate.commands[command]))
    def check(args: list[str]) -> None:
        ends_well(["validate", command, *args], also=(1,))

    check()


@pytest.mark.usefixtures("folder")
@tries(100)
@given(st.sampled_from([*SMALL.values(), QWEN]).flatmap(json_file), st.sampled_from(["full", "lora:r=2"]))
def test_any_model_config(content: bytes, name: str) -> None:
    """A config.json as it comes: keys missing, of another type, out of any range."""
    Path("model.json").write_bytes(content)
    ends_well(["predict", "--model", "model.json", "--method", name, *SETUP, "--json"])


@pytest.mark.usefixtures("folder")
@tries(100)
@given(mangled(OWN_DEVICE))
def test_any_device_file(content: bytes) -> None:
    """A device's TOML with whatever figures, also extreme ones."""
    Path("device.toml").write_bytes(content)
    ends_well(["predict", "--model", "tiny", "--method", "lora", "--device", "device.toml", "--json"])


@pytest.mark.usefixtures("folder")
@tries(100)
@given(mangled(HOST))
def test_any_host_file(content: bytes) -> None:
    """A host's TOML with whatever figures."""
    Path("host.toml").write_bytes(content)
    ends_well(["predict", "--model", "tiny", "--host", "host.toml", *SETUP, "--json"])


def config_file(path: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    """A training config under its own name, mutated."""
    text = path.read_text()
    kind = json_file(json.loads(text)) if path.suffix == ".json" else mangled(text)
    return kind.map(lambda content: (path.name, content))


@pytest.mark.usefixtures("folder")
@tries(60)
@given(st.sampled_from(sorted(CONFIGS.glob("*/*.*"))).flatmap(config_file))
def test_any_training_config(file: tuple[str, bytes]) -> None:
    """Configs of PEFT, TRL, Axolotl and LLaMA-Factory as people edit them."""
    name, content = file
    Path(name).write_bytes(content)
    ends_well(["predict", "--config", name, "--model", "tiny", *SETUP, "--json"])


@tries(100)
@given(mangled((DATA / "grids" / "cpu-small.toml").read_text()))
def test_any_grid_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """A grid of cells to measure."""
    path = tmp_path_factory.getbasetemp() / "grid.toml"
    path.write_bytes(content)
    with suppress(UserError):
        assert cells.load_grid(str(path), "cpu").cells


@pytest.fixture
def records(folder: Path) -> list[str]:
    """The lines of a file of records as it should be: of one process, and of two that shared a step."""
    path = written(folder / "records.jsonl")
    path.write_text(path.read_text() + (Path(__file__).parents[1] / "fixtures" / "two_ranks.jsonl").read_text())
    cpu_node(folder / "node.toml")
    return path.read_text().splitlines()


@st.composite
def records_file(draw: st.DrawFn, lines: list[str]) -> bytes:
    """Records of which one is edited, or which are cut off."""
    which = draw(st.integers(0, len(lines) - 1))
    line = json.dumps(draw(mutated(json.loads(lines[which]))))
    return draw(mangled("\n".join([*lines[:which], line, *lines[which + 1 :]])))


def test_any_records_file(records: list[str]) -> None:
    """Records of a measurement, cut off or edited; a check that fails ends with 1."""

    @tries(60)
    @given(records_file(records))
    def check(content: bytes) -> None:
        Path("records.jsonl").write_bytes(content)
        ends_well(["validate", "check", "--device", "cpu-epyc-genoa-2c", "--node", "node.toml", "--json"], also=(1,))

    check()


@pytest.mark.usefixtures("folder")
@tries(60)
@given(mangled("\n".join(["input_tokens,source", *(f"{n},web" for n in (40, 900, 17, 300))])), st.booleans())
def test_any_file_of_lengths(content: bytes, as_json: bool) -> None:
    """How long documents are, as a column, as JSON lines or as a number a line."""
    lines = content.replace(b",web", b"") if as_json else content
    Path("lengths.txt").write_bytes(lines)
    ends_well(["predict", "--model", "tiny", "--lengths", "lengths.txt", *SETUP, "--json"])


TRACES = sorted((Path(__file__).parents[1] / "fixtures" / "traces").glob("*.json.gz"))


@st.composite
def trace_file(draw: st.DrawFn) -> bytes:
    """A published profile, cut to a few of its events, with some of them edited; gzipped or not."""
    trace = json.loads(gzip.decompress(draw(st.sampled_from(TRACES)).read_bytes()))
    trace = {name: value[:40] if isinstance(value, list) else value for name, value in trace.items()}
    content = draw(json_file(trace))
    return gzip.compress(content) if draw(st.booleans()) else content


@pytest.mark.usefixtures("folder")
@tries(60)
@given(trace_file())
def test_any_profile(content: bytes) -> None:
    """What a profiler wrote on somebody's machine, of any version."""
    Path("trace.json").write_bytes(content)
    ends_well(["validate", "profile", "trace.json", "--json"])


@pytest.mark.usefixtures("folder")
@tries(40)
@given(mangled("name,calls,self_cpu_us,cpu_total_us,self_cuda_us,cuda_total_us\naten::mm,3,1.5,2,7,7\nx,1,0,0,4,4"))
def test_any_table_of_averages(content: bytes) -> None:
    """`key_averages()` as people paste it."""
    Path("averages.csv").write_bytes(content)
    ends_well(["validate", "profile", "averages.csv", "--json"])


@tries(12)  # each that can be read is predicted as a whole
@given(mangled((DATA / "grids" / "cpu-campaign.toml").read_text()))
def test_any_campaign_plan(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """What an hour on a rented machine is to be spent on; a mistake must not wait until it has begun."""
    path = tmp_path_factory.getbasetemp() / "plan.toml"
    path.write_bytes(content)
    with suppress(UserError), bounded():
        load_plan(path, "cpu").units("cpu", profile.load("cpu-epyc-genoa-2c"))


@tries(60)
@given(json_file(json.loads((CONFIGS / "peft" / "lora.json").read_text())))
def test_any_adapter_config(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """An adapter_config.json of whatever version of PEFT."""
    path = tmp_path_factory.getbasetemp() / "adapter_config.json"
    path.write_bytes(content)
    with suppress(UserError), bounded():
        PeftAdapter.read(path)


@tries(30)
@given(mangled(OWN_DEVICE), st.sampled_from(("mine.toml", "mine.TOML", ".toml", "l40s.toml", "\udcff.toml")))
def test_any_file_among_ones_own_devices(content: bytes, name: str) -> None:
    """One broken file must not hide all other devices."""
    (own.home() / "devices").mkdir(parents=True, exist_ok=True)
    file = own.home() / "devices" / name
    file.write_bytes(content)
    try:
        result = ends_well(["devices", "--json"])
        assert result.exit_code == 0
    finally:
        file.unlink()


@st.composite
def program_file(draw: st.DrawFn, values: dict[str, Any]) -> bytes:
    """A recorded program with edited values under a digest that is right, or a file that was cut or overwritten."""
    body = json.dumps(draw(mutated(values)), separators=(",", ":")).encode()
    head = json.dumps({"form": files.FORM, "sha256": sha256(body).hexdigest()}).encode()
    content = gzip.compress(head + b"\n" + body)
    at = draw(st.integers(0, len(content)))
    return draw(st.sampled_from((content, content, content, content[:at], content[:at] + b"\0\xff" + content[at:])))


def test_any_recorded_program(tmp_path: Path) -> None:
    """A cache that somebody shared: it is read, or recorded anew."""
    values = {
        "first": [{"name": "p", "phase": "forward", "repeat": 2, "host": {"modules": 1}, "ops": [[0, 2]]}], "later": [],
        "ops": [{"name": "mm", "in": [0], "out": [0], "read": 64, "written": [1, 2, 0, 0, 0, 0]}],
        "specs": [["bf16", [4, [0, 1, 0, 0, 0, 0]], 1]],
        "parameters": [["w", [4, 4], "bf16", "weight", True, True, 1, 16]],
        "live": {"checked": [[1], [2]], "least": [[1], [2]], "more": [], "times": [1]}, "traced": 1, "blocks": 1,
        "buffers": [0], "at": None, "made_with": {"torch": "2.13"}, "notes": [],
    }  # fmt: skip
    assert files.decoded_value(values).first

    @tries(100)
    @given(program_file(values))
    def check(content: bytes) -> None:
        (tmp_path / "program.json.gz").write_bytes(content)
        with suppress(files.NotAProgram), bounded():
            files.read_program(tmp_path / "program.json.gz")

    check()


TABLES = {
    "steps": published.published_steps,
    "peft_tuners": tuners.published_tuners,
    "lorafusion_layers": layers.published_layers,
}


@tries(60)
@given(st.sampled_from([*TABLES]).flatmap(lambda name: st.tuples(st.just(name), mangled(head_of(name)))))
def test_any_table_of_published_figures(tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes]) -> None:
    """Whoever adds a row to a table of cited figures is told the line that is wrong."""
    name, content = file
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(content)
    with suppress(UserError):
        TABLES[name](path)


def head_of(name: str) -> str:
    """The first lines of a table."""
    return "\n".join((DATA / "published" / f"{name}.csv").read_text().splitlines()[:6])
