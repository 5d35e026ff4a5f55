"""Whatever README and CONTRIBUTING tell a reader to type works, from an installed wheel and in an empty folder.

A command that is documented and stands in none of the tables below fails: say how it runs in a short form.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from campaigns import TINY
from documented import DOCUMENTS, ROOT, commands, options, snippets, typed

pytest.importorskip("peft")

WHERE = "--model gpt2 --device l40s"


@dataclass(frozen=True)
class Short:
    """A documented command as it runs here.

    Attributes:
        script: what is typed; empty: the command as it is printed.
        patch: Python that shortens a table of the command's.
        says: what it must print.
        code: its exit code.
    """

    script: str = ""
    patch: str = ""
    says: str = ""
    code: int = 0


COUNTS = "from itertools import islice; from validate.oracle import cases; g = cases.grid; "
TUNERS = (
    "from validate.published import tuners; found = tuners.published_tuners(); "
    "tuners.published_tuners = lambda source: [r for r in found if r.id in "
)
CELLS = """
[[cells]]
models = ["tiny"]
methods = ["full", "lora:r=4"]
setups = [{ batch = 2, seq = 16, dtype = "fp32" }]
"""
STAGES = """
[[stages]]
name = "floors"
blocks = ["host"]
most = 4
[[stages]]
name = "steps"
cells = [{ models = ["tiny"], methods = ["full", "lora:r=4"], setups = [{ batch = 2, seq = 16, dtype = "fp32" }] }]
"""
SHORT = {
    "perfmodel predict": Short(f"perfmodel predict --method lora {WHERE}", says="step "),
    "perfmodel compare": Short(f"perfmodel compare {WHERE}", says="speed-up"),
    "perfmodel explain A B": Short(f"perfmodel explain full lora {WHERE}", says="from A to B"),
    "perfmodel advise": Short(f"perfmodel advise {WHERE}", says="time against memory"),
    "perfmodel sweep": Short(f"perfmodel sweep {WHERE} --batch '1-4*2'", says="speed-up over full"),
    "perfmodel sweep ... --plot map.png": Short(
        f"perfmodel sweep {WHERE} --batch '1-64*2' --seq '128-1024*2' --plot map.png && test -s map.png", says="batch"
    ),
    "perfmodel report": Short(f"perfmodel report {WHERE} --axes none && test -s report.html", says="report.html"),
    "perfmodel record": Short(f"perfmodel record {WHERE} --methods full", says="any batch and length"),
    "perfmodel plan": Short(f"perfmodel plan {WHERE} --samples 100", says="Cheapest"),
    "perfmodel estimate": Short("perfmodel estimate gpt2 --device l40s", says="Fastest of what fits"),
    "perfmodel estimate Qwen/Qwen2.5-7B": Short(says="Fastest of what fits"),
    "perfmodel app": Short("perfmodel app --help", says="--port"),
    "python -m tests.injection": Short("cd $CHECKOUT && python -m tests.injection --help", says="--tries"),
    "perfmodel models": Short(says="tinyllama-1.1b"),
    "perfmodel nodes": Short(says="dgx-h100"),
    "perfmodel calibrate --network": Short("perfmodel calibrate --network --device cpu", says="torchrun", code=2),
    "perfmodel validate power": Short(says="kept"),
    "perfmodel validate fit --collectives FILE": Short(says="FILE", code=2),
    "perfmodel methods": Short(says="galore"),
    "perfmodel methods lora": Short(says="targets"),
    "perfmodel devices": Short(says="a100-80gb-sxm"),
    "perfmodel devices --json": Short(says='"residuals"'),
    "perfmodel completion bash >> ~/.bashrc": Short(
        "touch ~/.bashrc; perfmodel completion bash >> ~/.bashrc && . ~/.bashrc && complete -p perfmodel", says="-F"
    ),
    "perfmodel predict --traced": Short(
        f"perfmodel predict --traced {WHERE}",
        says="traced with up to",
    ),
    "perfmodel validate published --plot parity.png": Short(
        "perfmodel validate published --plot parity.png && test -s parity.png", says="parity.png"
    ),
    "perfmodel validate layers": Short(says="LoRAFusion"),
    "perfmodel validate tuners": Short(patch=f"{TUNERS}('lora-rank32', 'prompt_tuning-default')]", says="worst"),
    "perfmodel validate tuners --fit-host": Short(
        patch=f"{TUNERS}('lora-rank32', 'ia3-default')]", says="times as slow as the usual one"
    ),
    "perfmodel validate counts --grid quick": Short(
        patch=f"{COUNTS} cases.grid = lambda which: islice(g(which), 0, 140, 70)", says=" 0 cases differ"
    ),
    "perfmodel validate counts --parallel": Short(
        patch="from itertools import islice; from validate.oracle import parallel_cases as cases; g = cases.rank_grid; "
        "cases.rank_grid = lambda which: islice(g(which), 1); cases.pipeline_grid = lambda which: (); "
        "cases.compiled_grid = lambda which: ()",
        says=" 0 cases differ",
    ),
    "perfmodel validate counts --grid all": Short(
        patch=f"{COUNTS} cases.grid = lambda which: islice(g(which), 7, 8)", says=" 0 cases differ"
    ),
    "perfmodel validate coverage --output FILE": Short(
        "grep -v -e ,bert, -e ,IA3, $DATA/coverage/transformers-*.csv > FILE"
        " && perfmodel validate coverage --output FILE && tail -n 2 FILE",
        says="masked,bert",
    ),
    "perfmodel validate configs FOLDER": Short(
        "mkdir FOLDER && printf 'base_model: gpt2\\nmicro_batch_size: 1\\nsequence_len: 16\\n'"
        " > FOLDER/a.yml && perfmodel validate configs FOLDER",
        says="100 %",
    ),
    "perfmodel validate fit": Short(says="needs either --kernels FOLDER", code=2),
    "perfmodel validate fit --kernels FOLDER": Short(  # the measurements are not part of the project
        "mkdir FOLDER && perfmodel validate fit --kernels FOLDER", says="FOLDER has no gemm_bf16", code=2
    ),
    "perfmodel validate speed": Short(
        "perfmodel validate speed --json || test $? = 1  # a promise may be missed while other tests run",
        patch="from validate import speed; speed.COLD = {k: speed.COLD[k] for k in ('predict', 'models')};"
        "speed.ROUNDS = 2; speed.TRACES = (('gpt2', 'full'),);"
        "speed.TRACED = ('predict', '--traced', '--model', 'gpt2', *speed.TRACED[-2:]);"
        "speed.BATCHES, speed.SEQS = range(1, 11), range(64, 144, 8);"
        "speed._timed = lambda run, runs, timed=speed._timed: timed(run, 1)",
        says="sweep of 100,000, setups a second",
    ),
    "perfmodel validate host": Short(
        patch="from validate.calibration import hosts; hosts.LAYERS = 2; hosts.WARM_UP = 2; hosts.STEPS = 7",
        says="written: host.toml",
    ),
    "perfmodel validate engine": Short(  # with DeepSpeed it takes minutes
        patch="import sys; sys.modules['deepspeed'] = None", says="pip install 'perfmodel[engine]'", code=2
    ),
    "perfmodel validate profile FILE": Short(
        "cp $CHECKOUT/tests/fixtures/traces/h100_bert_forward.json.gz FILE && perfmodel validate profile FILE",
        says="aten::addmm",
    ),
    "perfmodel validate campaign --device cuda --budget 25m --output campaign": Short(
        f"echo '{TINY}{STAGES}' > plan.toml && perfmodel validate campaign --device cpu --threads 1 --budget 25m"
        " --output campaign --plan plan.toml && test -s campaign/page.html",
        says="6 of 6 units done",
    ),
    "perfmodel validate paper --device cuda": Short(  # that so few steps tell a verdict is no promise
        f"echo '{TINY}{CELLS}' > tiny.toml && perfmodel validate paper --device cpu --threads 1"
        " --profile cpu-epyc-genoa-2c || test $? = 1",
        patch="from validate.campaign import paper; paper.grid_of = lambda kind: 'tiny.toml'",
        says="LoRA is",
    ),
    "python -m tests.mutation": Short("cd $CHECKOUT && python -m tests.mutation --help", says="--sample"),
    "FUZZ_TRIES=2000 pytest tests/commands/test_fuzz.py": Short(
        "cd $CHECKOUT/tests && test -f commands/test_fuzz.py"
        " && FUZZ_TRIES=2000 python -c 'from fuzzing import tries; print(tries(1).max_examples)'",
        says="2000",
    ),
    "FUZZ_TRIES=1000 pytest tests/questions/test_any_setup.py": Short(
        "cd $CHECKOUT/tests && test -f questions/test_any_setup.py"
        " && FUZZ_TRIES=1000 python -c 'from fuzzing import tries; print(tries(1).max_examples)'",
        says="1000",
    ),
}  # fmt: skip
# commands that find PyTorch loaded already (`ready`)
LOADED = ("perfmodel validate", "perfmodel predict --traced", "perfmodel record")
SAME = {  # as printed without an option, and with it
    "perfmodel explain": "perfmodel explain A B",
    "perfmodel validate published": "perfmodel validate published --plot parity.png",
    "perfmodel validate counts": "perfmodel validate counts --grid quick",
    "perfmodel validate coverage": "perfmodel validate coverage --output FILE",
}
CHAIN = (  # one after another, in `test_from_calibration_to_check`
    "perfmodel calibrate", "perfmodel calibrate --device cpu --threads 1",
    "perfmodel validate measure --device cpu --grid standard --threads 1",
    "perfmodel validate check --html check.html", "perfmodel validate fit --records records.jsonl",
)  # fmt: skip
ELSEWHERE = {"torchrun": "measuring/test_team.py"}  # file of tests
EXAMPLES = "perfmodel (predict|compare|explain|advise|plan) .*--model"  # with their output, in test_readme.py
CI = {  # what installs and tests the checkout, and the line of .ci/run that does so
    "python3 -m venv .venv": "python3 -m venv", "python -m venv .venv": "python3 -m venv",
    ". .venv/bin/activate": '. "$scratch/dev/bin/activate"',
    "pip install -q .": "pip install --quiet .",
    "pip install . pytest pytest-xdist hypothesis": "pip install --quiet pytest pytest-xdist hypothesis",
    "pip install -q -e '.[dev]'": "pip install --quiet --editable '.[dev]'",
    "pip install -e '.[dev]'": "pip install --quiet --editable '.[dev]'",
    "pytest -n auto": "pytest -n auto", "ruff check": "ruff check .",
    "ruff format --check": "ruff format --check .", "mypy": "mypy", ".ci/run": "",
}  # fmt: skip
EXTRAS = r"pip install (?:-e )?'(?:\.|perfmodel)\[(\w+)\]'"
BEFORE = {  # what the README's Python takes for granted
    "trainer": """
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=64))
trainer = Trainer(model=model, args=TrainingArguments(output_dir="out", report_to=[], use_cpu=True))
""",
    "module": """
import torch
module = torch.nn.Linear(64, 64, device="meta")
inputs = torch.empty(8, 64, device="meta")
""",
}
HELP = """
import click
from perfmodel.cli import main

def show(command, context):
    print(command.get_help(context))
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        child = command.get_command(context, name)
        show(child, click.Context(child, parent=context, info_name=name))

show(main, click.Context(main))
"""
GRID = """
rounds = 1
warm_up = 2
steps = 16
[models.a-gpt2]
model_type = "gpt2"
n_embd = 256
n_layer = 2
n_head = 4
n_positions = 128
vocab_size = 2000
embd_pdrop = 0.0
attn_pdrop = 0.0
resid_pdrop = 0.0
[models.a-llama]
model_type = "llama"
hidden_size = 256
intermediate_size = 704
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 2000
pad_token_id = 0
[[cells]]
models = ["a-gpt2", "a-llama"]
methods = ["full", "lora:r=8", "top_k:k=1"]
setups = [{ batch = 4, seq = 96, dtype = "fp32" }]
"""


# Of the calibration's own check; what `validate check` says of its files is looked at more closely here
FEWER_STEPS = (
    "from validate.calibration import verify; cells, verify.TIMED = verify.cells, 2; "
    "verify.cells = lambda dtypes: list(cells(dtypes))[::2]"
)


def all_commands() -> Iterator[str]:
    for document in DOCUMENTS:
        yield from commands(document)


def test_every_documented_command_runs_somewhere() -> None:
    """A command that no test runs breaks unseen."""
    known = {*SHORT, *SAME, *CHAIN, *CI, *ELSEWHERE}
    found = set(all_commands())
    unknown = {c for c in found - known if not re.match(EXAMPLES, c) and not re.fullmatch(EXTRAS, c)}
    assert not unknown, "say in tests/house/test_documented.py how these run in a short form"
    assert not known - found, "these are documented no longer"
    assert all(command in (ROOT / "tests" / file).read_text() for command, file in ELSEWHERE.items())


def test_the_wheel_is_what_runs(site: Path, tmp_path: Path) -> None:
    """A file that only the checkout has would be missing for everybody else."""
    where = "import perfmodel, validate; from perfmodel.resources import DATA; print(perfmodel.__file__, DATA)"
    done = typed(f"python -c '{where}; print(validate.__file__)'; perfmodel --version", site, tmp_path)
    assert done.stdout.count(str(site)) == 3
    assert str(ROOT) not in done.stdout
    packaged = {p.relative_to(site / "perfmodel" / "data") for p in (site / "perfmodel" / "data").rglob("*.*")}
    assert packaged == {p.relative_to(ROOT / "data") for p in (ROOT / "data").rglob("*.*")}


@pytest.mark.parametrize("command", SHORT)
def test_a_documented_command_works(command: str, site: Path, ready: list[str], tmp_path: Path) -> None:
    """What a newcomer copies must run: nothing is prepared, nothing but the wheel is there."""
    short = SHORT[command]
    done = typed(short.script or command, site, tmp_path, short.patch, ready if command.startswith(LOADED) else ())
    assert done.returncode == short.code, done.stdout + done.stderr
    assert short.says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("snippet", [s for d in DOCUMENTS for s in snippets(d)], ids=lambda s: s.split()[1])
def test_documented_python_works(snippet: str, site: Path, ready: list[str], tmp_path: Path) -> None:
    """The library's face is what the README shows of it."""
    program = "\n".join([*(text for word, text in BEFORE.items() if word in snippet), snippet])
    done = typed(shlex.join([*ready, "-c", program]), site, tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_documented_option_is_known(site: Path, tmp_path: Path) -> None:
    """A text that names an option which was renamed leads nowhere."""
    (tmp_path / "help.py").write_text(HELP)
    known = typed("python help.py; cd $CHECKOUT; python -m tests.mutation --help", site, tmp_path).stdout
    mentioned = set().union(*map(options, DOCUMENTS)) - {"--check"}  # ruff's
    assert not {o for o in mentioned if not re.search(rf"{o}\b", known)}


def test_extras_and_ci_are_as_documented(site: Path) -> None:
    """`pip install '.[x]'` with a misspelt extra only warns; .ci/run is the one place that installs and tests."""
    (metadata,) = site.glob("perfmodel-*.dist-info/METADATA")
    provided = set(re.findall(r"^Provides-Extra: (\w+)$", metadata.read_text(), re.MULTILINE))
    wanted = {m[1] for command in all_commands() if (m := re.fullmatch(EXTRAS, command))}
    assert wanted <= provided
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(line in ci for line in CI.values())


@pytest.mark.alone
def test_from_calibration_to_check(site: Path, ready: list[str], tmp_path: Path) -> None:
    """The README's chapter on one's own machine, as it is printed but for its length; its files are used on the way."""
    (tmp_path / "tiny.toml").write_text(GRID)
    calibrate, measure, check, fit = CHAIN[1:]
    for _ in range(3):  # other programs may disturb one for a moment: it then refuses its result, and is repeated
        done = typed(f"{calibrate} --quick", site, tmp_path, FEWER_STEPS, ready)
        if done.returncode == 0:
            break
        assert "nothing was written" in " ".join(done.stdout.split())
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["tiny.toml"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "use it with --device mine" in done.stdout
    done = typed(measure.replace("standard", "tiny.toml"), site, tmp_path, python=ready)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = typed(check, site, tmp_path, python=ready)
    found = json.loads(typed("perfmodel validate check --json || test $? = 1", site, tmp_path, python=ready).stdout)
    assert checked.returncode == (0 if found["holds"] else 1), checked.stderr
    assert (tmp_path / "check.html").stat().st_size > 10_000
    holds_but_for_a_common_factor(found)
    use = "perfmodel predict --model gpt2 --device mine --host host.toml"
    done = typed(fit, site, tmp_path, python=ready)
    if done.returncode == 1:  # so few cells need not tell more than the calibration did
        assert "predicted worse by it" in " ".join(done.stdout.split())
        assert not (tmp_path / "host.toml").exists()
        return
    assert done.returncode == 0, done.stdout + done.stderr
    done = typed(use, site, tmp_path, python=ready)
    assert done.returncode == 0, done.stdout + done.stderr


def holds_but_for_a_common_factor(found: dict[str, Any]) -> None:
    """The limits of what is counted; of times, each step within half again, after what slows all steps alike.

    Other tests share the caches and the clock of this machine's cores, more or less from one second to the next: a
    calibration of twenty seconds and steps of a millisecond each are no accuracy benchmark (`validate check` is).
    """
    predicted = [cell["predicted_s"] / cell["measured_s"] for cell in found["cells"]]
    alike = median(predicted)
    assert 0.5 < alike < 2
    assert all(1 / 1.5 < ratio / alike < 1.5 for ratio in predicted), found["cells"]
    for limit in found["limits"]:
        assert limit["holds"] or limit["name"].startswith(("step time", "ratio", "wrong verdicts")), limit
    assert len(found["limits"]) == 7
