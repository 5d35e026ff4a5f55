"""Names of repositories: each stands for the bundled config of its family, version and size, or for none."""

import json
import tomllib

import pytest

from perfmodel import architectures, predict
from perfmodel.architectures import config, load, names
from perfmodel.architectures.names import bundled_for
from perfmodel.errors import UserError


@pytest.mark.parametrize(
    ("repository", "bundled"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("Qwen/Qwen2.5-Coder-32B", "qwen2.5-32b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"), ("Qwen/Qwen2.5-7B-Instruct-1M", "qwen2.5-7b"),
        ("NousResearch/Llama-3.2-1B", "llama-3.2-1b"), ("NousResearch/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("unsloth/llama-3-8b-bnb-4bit", "llama-3-8b"),
        ("shenzhi-wang/Llama3.1-70B-Chinese-Chat", "llama-3.1-70b"), ("llama3.2-1B", "llama-3.2-1b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"), ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("alpindale/Mistral-7B-v0.2-hf", "mistral-7b-v0.2"), ("teknium/OpenHermes-2.5-Mistral-7B", "mistral-7b"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistral-nemo-12b"),
        ("mistralai/Mistral-Small-24B-Base-2501", "mistral-small-24b"), ("HuggingFaceH4/zephyr-7b-beta", "mistral-7b"),
        ("mistralai/Mistral-Small-Instruct-2409", "mistral-small-22b"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2-1.7b"), ("openlm-research/open_llama_3b_v2", "open-llama-3b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"), ("google-bert/bert-base-uncased", "bert-base"),
        ("BlackSamorez/TinyLlama-1_1B-Chat-v1_0-AQLM-2Bit-1x16-hf", "tinyllama-1.1b"), ("gpt-2", "gpt2"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen2.5-7b"), ("mistral7b", "mistral-7b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-r1-qwen-1.5b"),
        ("deepseek-ai/deepseek-coder-7b-instruct-v1.5", "deepseek-llm-7b"), ("bert_base", "bert-base"),
        ("mistralai/Devstral-Small-2507", "mistral-small-24b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"), ("google/gemma-2b-it", "gemma-2b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"), ("microsoft/phi-1_5", "phi-1.5"),
        ("EleutherAI/pythia-1b-deduped", "pythia-1b"), ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3"),
        ("google/codegemma-1.1-7b-it", "gemma-7b"), ("allenai/OLMo-2-1124-7B-Instruct", "olmo-2-7b"),
        ("TinyLlama/TinyLlama_v1.1", "tinyllama-1.1b"), ("agentica-org/DeepCoder-14B-Preview", "qwen2.5-14b"),
        ("deepcogito/cogito-v1-preview-llama-3B", "llama-3.2-3b"), ("bigcode/starcoder2-3b", "starcoder2-3b"),
        ("neuralmagic/Sparse-Llama-3.1-8B-2of4", "llama-3.1-8b"), ("Qwen/Qwen3.5-27B-Instruct", "qwen3.5-27b"),
        ("togethercomputer/RedPajama-INCITE-Chat-3B-v1", "redpajama-incite-3b"),
        ("unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit", "qwen2.5-vl-7b"), ("Qwen/Qwen1.5-MoE-A2.7B", "qwen1.5-moe-a2.7b"),
        ("mistralai/Magistral-Small-2509", "mistral-small-3.1-24b"), ("tiiuae/Falcon-H1-7B-Base", "falcon-h1-7b"),
        ("tiiuae/Falcon-H1-1.5B-Deep-Instruct", "falcon-h1-1.5b-deep"), ("ai21labs/Jamba-v0.1", "jamba-v0.1"),
        ("alpindale/Llama-3.2-11B-Vision-Instruct", "llama-3.2-11b-vision"),
        ("Skywork/Skywork-Reward-V2-Qwen3-8B", "skywork-reward-v2-8b"), ("arcee-ai/AFM-4.5B-Base", "afm-4.5b"),
        ("HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", "gemma-7b"), ("THUDM/GLM-4-32B-0414", "glm-4-32b-0414"),
        ("HuggingFaceH4/starchat2-15b-sft-v0.1", "starcoder2-15b"), ("nvidia/Minitron-4B-Base", "nemotron-mini-4b"),
        ("axolotl-quants/DeepSeek-V2.5-bnb-nf4-bf16", "deepseek-v2.5"), ("Mapika/GLM-5.2-NVFP4", "glm-5.2"),
        ("nvidia/Qwen3-Next-80B-A3B-Instruct-NVFP4", "qwen3-next-80b-a3b"), ("MiniMaxAI/MiniMax-M2.5", "minimax-m2"),
        ("nvidia/Gemma-4-26B-A4B-NVFP4", "gemma-4-26b-a4b"), ("zai-org/GLM-Z1-32B-0414", "glm-4-32b-0414"),
        ("nvidia/DeepSeek-V4-Flash-NVFP4", "deepseek-v4-flash"), ("google/gemma-3n-E2B-it", "gemma-3n-e2b"),
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"), ("mistralai/Pixtral-12B-2409", "pixtral-12b"),
        ("unsloth/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout-17b-16e"),
        ("axolotl-quants/Llama-4-Scout-17B-16E-Linearized-bnb-nf4-bf16", "llama-4-scout-17b-16e-linearized"),
        ("axolotl-ai-co/Mistral-Small-4-119B-2603-BF16", "mistral-small-4-119b"),
        ("axolotl-ai-co/Mistral-Medium-3.5-128B-BF16", "mistral-medium-3.5-128b"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8", "nemotron-3-nano-30b-a3b"),
        ("Salesforce/xgen-7b-8k-inst", "xgen-7b"), ("ibm-granite/granite-4.0-tiny-preview", "granite-4.0-tiny-preview"),
    ],
)  # fmt: skip
def test_a_mirror_or_a_tuned_copy_is_the_bundled_model(repository: str, bundled: str) -> None:
    """Training scripts name mirrors and instruct variants; who mirrors or tunes a model does not change its dims."""
    found = bundled_for(repository)
    assert found is not None
    assert found.name == bundled


@pytest.mark.parametrize(
    "repository",
    [
        "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2-Audio-7B", "Qwen/Qwen2.5-Omni-7B",
        "llava-hf/llava-v1.6-mistral-7b-hf", "Qwen/Qwen2-57B-A14B",
        "google/paligemma2-3b-pt-224", "google/medgemma-4b-it", "google/gemma-3n-E4B-it",
        "Qwen/Qwen3.5-397B-A17B", "Qwen/Qwen3-VL-8B-Instruct", "zai-org/GLM-4.5", "zai-org/GLM-4.6V", "zai-org/GLM-4.7",
        "mistralai/Ministral-3-8B-Base-2512", "Skywork/Skywork-Reward-V2-Llama-3.1-8B", "Salesforce/blip2-opt-2.7b",
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "hfl/chinese-llama-2-7b", "microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-MoE-instruct",
        "deepseek-ai/DeepSeek-V2", "deepseek-ai/DeepSeek-V4-Pro", "PaddlePaddle/PaddleOCR-VL",
        "tiiuae/falcon-mamba-7b",
        "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1",
        "nvidia/Llama-3.1-Nemotron-Nano-8B-v1",
        "ibm-granite/granite-4.0-h-tiny", "LiquidAI/LFM2.5-VL-450M",
        "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4",
        "somebody/a-tuned-qwen-7b", "somebody/Llama-3-8B-and-Qwen3-8B", "somebody/mistral-7b-v0.9",
        "google-bert/bert-base-multilingual-cased", "peft-internal-testing/gpt2-lora-random",
        "axolotl-ai-co/gemma-2-33M",
        "nvidia/Mistral-NeMo-Minitron-8B-Base", "Qwen/Qwen3-Embedding-8B",
        "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", "", "/", "x" * 5000, "7b", "-",
    ],
)  # fmt: skip
def test_another_program_or_an_unclear_name_is_none_of_them(repository: str) -> None:
    """A wrong model would be a wrong answer that looks right: family, version and size agree, or it is refused."""
    assert bundled_for(repository) is None


def test_every_bundled_model_is_found_by_the_repository_it_comes_from() -> None:
    """A word or alias that is added for one family must not take another's name away."""
    for name in architectures.model_names():
        url = str(load(name).values["_source"])
        repository = "/".join(url.split("/")[3:5])
        if "huggingface.co" in url:
            found = bundled_for(repository)
            assert found is not None, repository
            assert found.name == name
    table = tomllib.loads((names.MODELS / "names.toml").read_text())
    assert {*table["aliases"].values(), *table["kept"]} <= set(architectures.model_names())


def test_the_answer_says_which_config_it_took() -> None:
    """The reader must see that the dims are not those of his repository's own file, and that its packing is not in."""
    tuned = predict("unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit", device="l40s", batch=1, seq=16)
    assert tuned.model == "qwen2.5-0.5b"
    assert "unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit is taken for qwen2.5-0.5b" in tuned.notes[0]
    assert "bnb-4bit weights are not" in tuned.notes[0]
    for own in ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"):
        assert not any("taken for" in note for note in predict(own, device="l40s", batch=1, seq=16).notes)


def test_finding_a_name_reads_one_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold command line would wait for a hundred files."""
    read: list[str] = []
    monkeypatch.setattr(config, "read_json", lambda path: read.append(path.name) or json.loads(path.read_text()))
    load("NousResearch/Llama-3.2-1B")
    load("llama-3.2-1b")
    assert read == ["llama-3.2-1b.json"] * 2


def test_what_a_bundled_config_notes_is_said() -> None:
    """The text decoder of a vision-language model is not the whole of it."""
    tuned = load("google/gemma-3-4b-it")
    assert "is taken for gemma-3-4b" in tuned.note
    assert tuned.note.endswith(load("gemma-3-4b").note)
    assert "no vision tower" in load("gemma-3-4b").note


def message_of(name: str) -> str:
    with pytest.raises(UserError) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lama-3.2-3b", "did you mean 'llama-3.2-3b'?"), ("codelama-34b", "did you mean 'codellama-34b'?"),
        ("mistral-nemmo-12b", "did you mean 'mistral-nemo-12b'?"), ("gpt-neo-3b", "gpt-neo-1.3b, gpt-neo-2.7b, "),
        ("bloom-7b1", "perfmodel models lists"), ("mt5-base", "did you mean 't5-base'?"),
        ("glm-4.7", "bundled: glm-4.7-flash (or"), ("deepseek-v2", "bundled: deepseek-v2-lite, deepseek-v2.5 (or"),
        ("replit/replit-code-v1-3b", "code of its own repository"),
        ("LnL-AI/dbrx-base-converted-v2", "never run here; give one like it"),
    ],
)  # fmt: skip
def test_an_unknown_name_gets_the_nearest_of_its_kind(typed: str, meant: str) -> None:
    """Most unknown names are typing errors; another family's model of a like name is no help."""
    assert meant in message_of(typed)


def test_a_long_family_is_cut_and_its_nearest_come_first() -> None:
    """45 names of qwens were listed, and one of them was cut in its middle."""
    said = message_of("qwen3.5-2b").split("family: ")[1].split(" (or")[0]
    named, more = said.split(" and ")
    assert {"qwen3.5-4b", "qwen3.5-0.8b"} <= set(named.split(", ")) <= set(names.model_names())
    assert len(named.split(", ")) == config.NAMED
    assert int(more.removesuffix(" more")) == len(names.family("qwen3.5-2b")) - config.NAMED


def test_names_are_found_in_any_case() -> None:
    """Model cards write them with capitals."""
    assert load("Llama-3.2-3B").name == "llama-3.2-3b"


def test_the_hub_id_of_a_bundled_model_needs_no_network() -> None:
    """People paste what their training script says."""
    assert load("meta-llama/Llama-3.2-3B").values == load("llama-3.2-3b").values
    assert load("openai-community/gpt2").name == "gpt2"
