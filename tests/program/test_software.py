"""Versions of software as an input: what they decide, and that no spelling of them goes unseen."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import Setup, UserError, compare, predict
from perfmodel.program.software import CURRENT, SoftwareStack

CARDS = {"A100": "8.0", "L40S": "8.9", "H100": "9.0", "B200": "10.0", "B300": "10.3", "RTX 5090": "12.0"}
# cards whose wheels of PyTorch try cuDNN's attention first, by release and CUDA (sources: program/software.py)
CUDNN_FIRST = {
    ("2.4", "12.1"): (), ("2.5.0", "12.4"): ("H100",), ("2.5.1", "12.4"): (), ("2.6", "12.4"): (), ("2.8", "12.8"): (),
    ("2.9", "12.6"): ("H100", "B200"), ("2.9.1", "13.0"): ("H100", "B200"), ("2.10", "12.8"): (),
    ("2.10", "13.0"): ("H100", "B200"), ("2.11", "12.6"): (), ("2.11", "12.8"): ("H100", "B200", "B300"),
    ("2.13", "13.0"): ("H100", "B200", "B300"), ("2.13", "12.6"): (),
}  # fmt: skip
numbers = st.integers(0, 60)


@pytest.mark.parametrize("release", CUDNN_FIRST, ids=" CUDA ".join)
def test_the_attention_kernel_follows_release_build_and_card(release: tuple[str, str]) -> None:
    """On H100 the two kernels differ by a factor of up to two, and the default changed four times."""
    stack = SoftwareStack.of({"torch": release[0], "cuda": release[1]})
    cards = CARDS if release[0] >= "2.6" or release[0].startswith("2.1") else {"A100": "8.0", "H100": "9.0"}
    assert tuple(name for name, capability in cards.items() if stack.prefers_cudnn(capability)) == CUDNN_FIRST[release]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.tuples(st.integers(major - 1, major + 1).filter(lambda n: n >= 0), numbers, st.integers(0, 3))
            for name, (major, _, _) in ((name, getattr(CURRENT, name)) for name in CURRENT.as_dict())
        },
    )
)
@settings(max_examples=200, derandomize=True)
def test_a_stack_is_read_back_from_what_it_says_or_ends_in_one_line(given: dict[str, tuple[int, int, int]]) -> None:
    """A record's JSON, the command line and Python must mean the same versions, and no other exception may leave."""
    told = {name: ".".join(map(str, version)) for name, version in given.items()}
    try:
        stack = SoftwareStack.of(told)
    except UserError:
        with pytest.raises(UserError, match=r"\Astack: [^\n]*\Z"):
            predict("gpt2", stack=told)
        return
    assert all(getattr(stack, name) == version for name, version in given.items())
    assert SoftwareStack.of(",".join(f"{name}={version}" for name, version in stack.as_dict().items())) == stack
    assert Setup(stack=json.loads(json.dumps(Setup(stack=stack).as_dict()["stack"]))).stack == stack


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ("tourch=2.6", "package 'tourch' is unknown: did you mean 'torch'"), ("torch", "'torch' has no version"),
        ("torch=new", "torch 'new' is no version such as 2.13"), ("torch=1.13", "from 2.0 to 2.x, today 2.13"),
        ("transformers=6", "from 4.36 to 5.x"), ("torch=2.6,torch=2.7", "torch is given twice"),
        ("torch=2.6,cuda=13", "torch 2.6 has no build for CUDA 13"), ("", "has no version"),
    ],
)  # fmt: skip
def test_what_is_no_stack_ends_in_one_line_that_says_why(told: str, line: str) -> None:
    """A version that is taken for another would change the answer without a word."""
    with pytest.raises(UserError, match=line):
        predict("gpt2", "full", stack=told)


def test_pytorch_names_its_build_or_is_the_one_that_pip_takes() -> None:
    """`torch.__version__` can be given as it is."""
    for told, cuda in (("2.6.0+cu126", "12.6"), ("2.6", "12.4"), ("2.10", "12.8"), ("2.12", "13.0"), ("2.0.1", "11.7")):
        assert SoftwareStack.of({"torch": told}).as_dict()["cuda"] == cuda
    assert SoftwareStack.of("torch=2.6.0+cu126,cuda=12.4").as_dict()["cuda"] == "12.4"


def test_adapters_are_in_the_bases_dtype_before_peft_0_12() -> None:
    """Half the bytes of every adapter branch: the same step as with adapter_dtype=bf16 today, but beside few bits."""
    for method, setup in (("lora:r=8", {}), ("dora:r=8", {"padded": True}), ("top_k:k=1,inner=lora", {})):
        old = predict("qwen2.5-0.5b", method, stack="peft=0.11", batch=2, seq=64, **setup)
        comma = "," if ":" in method else ":"
        today = predict("qwen2.5-0.5b", f"{method}{comma}adapter_dtype=bf16", batch=2, seq=64, **setup)
        assert (old.bytes, old.memory, old.time.phases) == (today.bytes, today.memory, today.time.phases), method
        assert old.method == predict("qwen2.5-0.5b", method).method
    few_bits, upcast = (predict("qwen2.5-0.5b", "qlora:r=8", stack=told).bytes for told in ("peft=0.11", "current"))
    assert few_bits == upcast


def test_an_old_peft_takes_the_dtype_of_the_4_bit_storage_for_its_adapters() -> None:
    """FSDP-QLoRA stores its 4-bit values in bf16, and PEFT before 0.12 then made bf16 adapters: a tenth of the step."""
    stored = "qlora:r=8,quant_storage=bf16"
    old = predict("qwen2.5-0.5b", stored, stack="peft=0.9", batch=2, seq=64)
    today = predict("qwen2.5-0.5b", f"{stored},adapter_dtype=bf16", batch=2, seq=64)
    assert (old.bytes, old.memory) == (today.bytes, today.memory)
    assert old.bytes != predict("qwen2.5-0.5b", stored, batch=2, seq=64).bytes
    in_fp32 = predict("qwen2.5-0.5b", "qlora:r=8,quant_storage=fp32", stack="peft=0.9", batch=2, seq=64)
    assert "its adapters are in fp32, as that peft makes them" in in_fp32.notes


def test_a_search_tells_adapters_in_fp32_from_those_of_an_old_peft() -> None:
    """A comparison shares what its methods record alike, and these two are alike only since 0.12."""
    told = compare("qwen2.5-0.5b", ["lora:r=8", "lora:r=8,adapter_dtype=fp32"], stack="peft=0.11", batch=2, seq=64)
    default, upcast = told.predictions
    assert default.bytes["total"] < upcast.bytes["total"]


def test_an_answer_names_the_stack_where_it_matters() -> None:
    """The reader of an H100's answer must see which attention kernel was assumed, and how to say another."""
    (assumed,) = (note for note in predict("gpt2", device="h100-sxm").notes if "--stack" in note)
    assert "tries cuDNN's kernel first" in assumed
    assert CURRENT.words in assumed
    assert not any("--stack" in note for note in predict("gpt2", device="l40s").notes)
    told = predict("gpt2", "lora", device="h100-sxm", stack="torch=2.6,peft=0.11").notes
    (old,) = (note for note in told if "--stack" in note)
    assert "torch 2.6, CUDA 12.4" in old
    assert "does not try cuDNN's kernel first" in old
    assert any("adapters are in bf16" in note for note in told)
    assert "casts of fp32" not in old
    assert any("casts of fp32" in note for note in predict("gpt2", device="l40s", stack="torch=2.5").notes)


def test_a_mixture_loops_over_its_experts_before_transformers_5() -> None:
    """Grouped products of experts came with 5.0: a step of 2024 cannot have had them."""
    old, loop, today = (
        predict("mixtral-8x7b", "lora", device="h100-sxm", seq=64, **told).dispatches["total"]
        for told in ({"stack": "transformers=4.57"}, {"experts": "eager"}, {})
    )
    assert old == loop > today
