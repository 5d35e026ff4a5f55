"""What a link, a form and a file choose: the way there and back, and what a stranger may not choose."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("jinja2")

from perfmodel.app.answers import answer_html
from perfmodel.app.choices import Choices, of_form, of_query, setup_fields, to_query, with_fields
from perfmodel.app.uploads import of_file
from perfmodel.app.written import as_command, as_config
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.imports import read, read_alone
from perfmodel.setup import Setup

CHOICES = (
    Choices(),
    Choices("tinyllama-1.1b", "h100-sxm", ("full", "lora:r=8", "qlora:r=16,targets=all-linear"), price=2.5, epochs=0.5),
    Choices(setup=Setup(batch=8, seq=4096, checkpoint="block", optimizer="adamw-8bit", clip_grad=False, grad_accum=4)),
    Choices(setup=Setup(gpus=16, nodes=2, parallel="fsdp2", tp=2, kernels="liger", seq=2048)),
    Choices("llama-3.1-8b", setup=Setup(gpus=8, pp=2, pp_schedule="interleaved:v=2", grad_accum=4)),
    Choices("qwen3-8b", "h100-sxm", setup=Setup(gpus=8, node="aws-p5", parallel="fsdp2", cp=4, cp_rotate="alltoall")),
    Choices(setup=Setup(gpus=2, ddp="find-unused")),
    Choices(setup=Setup(gpus=16, nodes=2, parallel="fsdp2", reshard=False, shard_group=8, reduce_dtype="fp32")),
    Choices(setup=Setup(gpus=8, parallel="fsdp2", fsdp_units="blocks")),
    Choices(setup=Setup(parallel="zero3", offload="params")),
    Choices(setup=Setup(dtype="fp32", amp="bf16", lengths="400:1200", group_by_length=True, routing="zipf:1.1")),
    Choices(methods=("lora:targets=q_proj+v_proj,dropout=0.1", "dora:r=4"), setup=Setup(objective="dpo", prompt=64)),
)


@pytest.mark.parametrize("c", CHOICES)
def test_a_link_leads_back(c: Choices) -> None:
    """A link that was shared shows what its sender saw."""
    assert of_query(to_query(c)) == c


@pytest.mark.parametrize("c", CHOICES)
def test_the_command_asks_the_same(c: Choices) -> None:
    """What is copied from the page answers as the page does: every option of it is one of the commands'."""
    for line in as_command(c).splitlines():
        _, name, *words = shlex.split(line)
        with main.make_context("perfmodel", [name]) as parent:
            command = main.get_command(parent, name)
        with command.make_context(name, words, parent=parent) as context:
            given = context.params
        assert (given["model"], tuple(given["methods"])) == (c.model, c.methods)
        asked = {n: given[n] for n in setup_fields() if n in given}
        if name == "plan":  # which takes several numbers of GPUs
            (asked["gpus"],) = given["gpus"]
        assert Setup(**asked) == c.setup
    assert (given["samples"], given["epochs"]) == (c.samples, c.epochs)


@pytest.mark.parametrize("name", ["full", "lora:r=16,targets=q_proj+v_proj", "qlora:r=8"])
@pytest.mark.parametrize("setup", [Setup(batch=4, seq=512), Setup(batch=1, seq=2048, checkpoint="block", grad_accum=8)])
def test_the_config_says_what_was_chosen_or_what_it_does_not_say(name: str, setup: Setup) -> None:
    """A config that silently trains something else would be worse than none."""
    text = as_config(Choices(methods=("lora:r=4", name), setup=setup))
    comments = [line for line in text.splitlines() if line.startswith("#")]
    found = read_alone("config.yaml", text)
    assert found.setup["batch"] == setup.batch
    assert found.setup["checkpoint"] == setup.checkpoint
    if name.startswith("qlora"):  # TRL has its adapters in bf16, without nested constants: that is said
        assert comments == [f"# read as {found.method}, not as {name}", "# not said here: kernels=torch"]
    else:  # TRL fuses its head, and no key of a file keeps it from that
        assert (found.method, comments) == (name, ["# not said here: kernels=torch"])


@pytest.mark.parametrize(
    ("targets", "listed"),
    [
        ("q_proj", ["q_proj", "q_proj"]), ("all-linear", ["all-linear"]), ("q_proj+v_proj", ["q_proj", "v_proj"]),
    ],
)  # fmt: skip
def test_targets_of_the_config_are_those_that_trl_and_peft_make_of_them(targets: str, listed: list[str]) -> None:
    """TRL takes a target out of a list of one; PEFT matches it with whole paths, of which no name is one."""
    text = as_config(Choices(methods=("full", f"lora:r=8,targets={targets}")))
    assert yaml.safe_load(text)["lora_target_modules"] == listed
    assert of_file("config.yaml", text, Choices())[0].methods[1] == f"lora:r=8,targets={targets}"


def test_what_a_config_cannot_say_is_said() -> None:
    text = as_config(Choices(methods=("full", "paca:r=8"), setup=Setup(batch=1, seq=64, lengths="400:1200")))
    assert text.startswith("# read as full, not as paca:r=8\n# not said here: lengths=400:1200 kernels=torch\n")


def test_an_optimizer_that_transformers_has_no_name_for_is_said() -> None:
    """`optim: muon` ends transformers' own reading of the file."""
    text = as_config(Choices(methods=("full", "full"), setup=Setup(batch=1, seq=64, optimizer="muon")))
    assert "optim" not in text.partition("model_name_or_path")[2]
    assert "optimizer=muon" in text.splitlines()[0]


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("model=/etc/passwd", "no paths"),
        ("model=../data/models/gpt2.json", "no paths"),
        ("model=some-org/their-model", "nothing from the hub"),
        ("model=gpt22", "did you mean"),
        ("device=/tmp/own.toml", "no paths"),
        ("gpus=8&node=/tmp/own.toml", "no paths"),
        ("gpus=8&node=dgx-h1000", "did you mean"),
        ("gpus=8&cp=3&parallel=fsdp2", "does not divide"),
        ("lengths=/etc/passwd", "MEAN:P95"),
        ("method=full&method=lora:targets=/(a%2B)%2B$/", "regular expressions"),
        ("method=full&method=<script>", "unknown method"),
        ("method=full", "2 to 6 methods"),
        ("&".join(["method=full"] * 7), "2 to 6 methods"),
        ("batch=1e9", "whole number"),
        ("batch=0", "batch must be"),
        ("batch=99999999999", "whole number"),
        ("clip_grad=perhaps", "true or false"),
        ("epochs=nan", "more than 0"),
        ("samples=-3", "more than 0"),
        ("dtype=int3", "dtype"),
        (f"model={'x' * 301}", "characters"),
        (f"x={'x' * 4000}", "longer than"),
    ],
)
def test_what_a_stranger_may_not_choose(query: str, complaint: str) -> None:
    """A link is anybody's: no file is read by it, nothing is fetched, nothing grows without bound."""
    with pytest.raises(UserError, match=complaint):
        answer_html(of_query(query))


def test_keys_of_others_are_passed_over() -> None:
    """Who hands on a link appends keys of their own."""
    assert of_query("utm_source=mail&__theme=dark&seq=512&batch=4") == Choices()


@pytest.mark.parametrize(("model", "attention"), [("gpt-oss-20b", "eager"), ("gpt2", "sdpa")])
def test_a_model_without_the_usual_attention_has_its_own(model: str, attention: str) -> None:
    """Who chooses a model with the mouse does not know that its program lacks a kernel."""
    assert of_query(f"model={model}").setup.attention == attention
    assert of_form(model, "l40s", ["full", "lora"], {"batch": 1}, "", 1, 1, None).setup.attention == attention
    assert of_query("model=gemma-2-2b&attention=flash2").setup.attention == "flash2"


@pytest.mark.parametrize("field", ["stack", "images", "colour"])
def test_fields_that_need_files_or_traces_cannot_be_set(field: str) -> None:
    with pytest.raises(UserError, match="cannot be set on this page"):
        with_fields(Setup(), {field: "x"})


def test_the_form_reads_what_is_typed() -> None:
    typed = {"batch": "4", "seq": "210", "dtype": "bf16"}
    c = of_form("llama-3.2-3b", "L40S", ["full", "lora:r=8"], typed, "--kernels=liger, in-backward=false", 100, "2", "")
    assert c.setup == Setup(batch=4, seq=210, kernels="liger")
    assert (c.device, c.samples, c.epochs, c.price) == ("l40s", 100, 2.0, None)
    with pytest.raises(UserError, match="NAME=VALUE"):
        of_form("gpt2", "l40s", ["full", "lora"], typed, "liger", 1, 1, None)


AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
adapter: lora
lora_r: 16
lora_target_modules: [q_proj, v_proj]
sequence_len: 2048
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
bf16: full
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
"""


def test_a_config_fills_the_form() -> None:
    """A file's model, method, setup and epochs are what is answered; what it does not say stays as it was."""
    c, said = of_file("mine.yml", AXOLOTL, Choices(device="h100-sxm", price=3.0, setup=Setup(packing="dense")))
    assert (c.model, c.device, c.price, c.epochs) == ("llama-3.2-1b", "h100-sxm", 3.0, 2.0)
    assert c.methods[0] == "full"
    assert c.methods[1].startswith("lora:r=16,targets=q_proj+v_proj")
    assert (c.setup.batch, c.setup.seq, c.setup.grad_accum) == (2, 2048, 4)
    assert (c.setup.checkpoint, c.setup.packing) == ("block", "none")
    assert "Axolotl" in said[0]
    assert of_query(to_query(c)) == c


ONE_BILLION = "model_name_or_path: meta-llama/Llama-3.2-1B\n"
OF_TRL = ONE_BILLION + "dataset_name: x\nper_device_train_batch_size: 3\nmax_length: 777\n"
OF_TRANSFORMERS = ONE_BILLION + "per_device_train_batch_size: 3\n"
OF_FACTORY = ONE_BILLION + "finetuning_type: full\nstage: sft\n"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (OF_TRL, OF_FACTORY + "pure_bf16: true\n"),
        (OF_TRL, OF_TRANSFORMERS),
        (AXOLOTL + "fp8: true\n", OF_TRL),
        (AXOLOTL + "torch_compile: true\n", "model: meta-llama/Llama-3.2-1B\nmodel_class: llm\nmicro_batch_size: 2\n"),
        (AXOLOTL.replace("adapter", "rl: grpo\nadapter"), AXOLOTL),
        (OF_FACTORY + "bf16: true\nuse_galore: true\ngalore_layerwise: true\n", OF_TRL),
    ],
)
def test_a_config_is_read_alike_whatever_was_dropped_before(first: str, then: str) -> None:
    """What a file leaves out is as usual, not as another file had it; sizes and GPUs that it does not name are kept."""
    before = Choices(setup=Setup(batch=4, seq=512, gpus=4, nodes=2, node="aws-p5"))
    dropped, _ = of_file("first.yaml", first, before)
    kept = {name: getattr(dropped.setup, name) for name in ("batch", "seq")}
    fresh = replace(before, setup=replace(before.setup, **kept))
    after, said = of_file("then.yaml", then, dropped)
    alone, said_alone = of_file("then.yaml", then, fresh)
    assert (after.setup, said) == (alone.setup, said_alone)
    assert (after.setup.gpus, after.setup.nodes, after.setup.node) == (4, 2, "aws-p5")


SHARDED = AXOLOTL + "fsdp_version: 2\nfsdp_config: {reshard_after_forward: true, offload_params: true}\n"


@pytest.mark.parametrize(
    ("text", "before", "expected", "told"),
    [
        (AXOLOTL, Setup(gpus=8, parallel="zero3", offload="params"), {"parallel": "zero3", "offload": "params"}, ""),
        (AXOLOTL, Setup(gpus=8, pp=2, pp_schedule="gpipe"), {"parallel": "ddp", "pp": 2, "pp_schedule": "gpipe"}, ""),
        (SHARDED, Setup(gpus=8, pp=2), {"parallel": "fsdp2", "offload": "params", "pp": 1}, ""),
        (SHARDED, Setup(gpus=8, tp=2), {"parallel": "fsdp2", "tp": 1}, ""),
        (
            SHARDED.replace("true, off", "false, off") + "dp_shard_size: 4\n",
            Setup(gpus=8),
            {"parallel": "fsdp2", "reshard": False, "shard_group": 4},
            "",
        ),
        (SHARDED, Setup(gpus=8, reshard=False, shard_group=2), {"reshard": True, "shard_group": None}, ""),
        (
            SHARDED,
            Setup(parallel="zero3", offload="params"),
            {"parallel": "ddp", "offload": "none"},
            "one GPU, without",
        ),
    ],
)
def test_a_config_is_of_as_many_gpus_as_are_chosen(text: str, before: Setup, expected: object, told: str) -> None:
    """Its form if it names one, else the one that is chosen; of one GPU it is said what is left out."""
    c, said = of_file("mine.yml", text, Choices(setup=before))
    assert isinstance(expected, dict)
    assert {name: getattr(c.setup, name) for name in expected} == expected
    assert c.setup.gpus == before.gpus
    assert ("without FSDP" in " ".join(said)) == bool(told)


LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_machines: 1
num_processes: 4
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}
parallelism_config: {parallelism_config_dp_shard_size: 2, parallelism_config_cp_size: 2}
"""


def test_a_launchers_config_chooses_gpus_and_what_they_do() -> None:
    """What was chosen of the step stays, what was chosen of several GPUs goes; it is read as on the command line."""
    before = Choices("qwen3-8b", setup=Setup(batch=1, seq=4096, gpus=8, pp=2, kernels="liger", grad_accum=4))
    c, said = of_file("launch.yaml", LAUNCH, before)
    assert c.setup == Setup(
        batch=1, seq=4096, grad_accum=4, amp="bf16", gpus=4, nodes=1, parallel="fsdp2", cp=2, cp_rotate="allgather"
    )
    assert said[0] == "launch.yaml (accelerate) was read in memory and is stored nowhere: 4 GPUs, fsdp2, cp 2"
    assert "not Liger's" in said[1]
    zero, _ = of_file("ds.json", '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', before)
    assert (zero.setup.gpus, zero.setup.parallel, zero.setup.pp) == (8, "zero2", 1)
    assert of_query(to_query(c)) == c


def test_a_training_config_that_says_how_many_run_it_is_no_launchers() -> None:
    """TRL's scripts hand `num_processes` on to accelerate."""
    c, said = of_file("sft.yaml", OF_TRL + "num_processes: 4\n", Choices())
    assert (c.model, c.setup.batch, c.setup.seq) == ("llama-3.2-1b", 3, 777)
    assert said[0].startswith("sft.yaml (Transformers/TRL) was read")


def test_an_adapter_fills_the_form() -> None:
    adapter = '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "gpt2"}'
    of_gpt2, _ = of_file("adapter_config.json", adapter, Choices())
    with pytest.raises(UserError, match="q_proj"):  # it has none
        answer_html(of_gpt2)
    c, _ = of_file("adapter_config.json", adapter.replace("gpt2", "meta-llama/Llama-3.2-3B"), Choices())
    assert (c.model, c.methods, c.setup) == ("llama-3.2-3b", ("full", "lora:r=4,targets=q_proj"), Choices().setup)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.py", "import os", "ends in"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.yaml", "[" * 10_000, "not valid YAML"),
        ("a.yaml", "x: 1", "not a config of"),
        ("a.json", "{}" + " " * 2**20, "larger than"),
        ("a.yaml", "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefg", "bcdefgh", strict=True)
        ), "more than"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a.yaml", AXOLOTL.replace("NousResearch/Llama-3.2-1B", "/etc"), "unknown model"),
        ("a.yaml", AXOLOTL.replace("[q_proj, v_proj]", "'(a+)+b'"), "regular expressions"),
        ("a.json", '{"peft_type": "XLORA", "base_model_name_or_path": "gpt2"}', "command line"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(name: str, text: str, complaint: str) -> None:
    """Whatever is dropped is only parsed: nothing of it runs, and nothing of it makes the server large."""
    with pytest.raises(UserError, match=complaint) as told:
        of_file(name, text, Choices())
    assert "\n" not in str(told.value)


def test_no_file_that_an_upload_names_is_read(tmp_path: Path) -> None:
    """On somebody's server a path in a config is a question about the server's disk."""
    secret = tmp_path / "other.json"
    secret.write_text('{"zero_optimization": {"stage": 3}}')
    text = AXOLOTL + f"deepspeed: {secret}\n"
    local = tmp_path / "mine.yml"
    local.write_text(text)
    assert read(local).setup["engine"] == "deepspeed-zero3"  # on the command line it is one's own disk
    assert read_alone("mine.yml", text).setup["engine"] == "torch"
    launch = LAUNCH.replace("FSDP", "DEEPSPEED") + f"deepspeed_config: {{deepspeed_config_file: {secret}}}\n"
    launch = launch.replace("cp_size: 2", "cp_size: 1").replace("shard_size: 2", "shard_size: 4")
    assert of_file("launch.yaml", launch, Choices())[0].setup.parallel == "ddp"
    v1 = f"model: gpt2\ndist_config: {{name: deepspeed, config_file: {secret}}}\nsample_backend: hf\n"
    secret.write_text("not JSON")
    read_alone("mine.yml", v1 + "train_dataset: x\nmicro_batch_size: 1\ncutoff_len: 64\nbase_model: gpt2\n")


def test_choices_are_values() -> None:
    """They are the key under which maps are kept."""
    assert hash(replace(Choices())) == hash(Choices())
