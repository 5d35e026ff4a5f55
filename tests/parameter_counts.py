"""Parameters of the bundled models, and who counted them."""

# Parameters of the checkpoints, tied weights once. "published": that exact figure was seen in public code, presets or
# hub listings; "built": `num_parameters()` of the transformers model of the same config (transformers 5.24). The
# sources of each are listed with the model files' own `_source` and were checked on 2026-11-24.
PUBLISHED = {
    "codellama-34b": 33_743_970_304,  # Together's catalogue
    "gpt-neo-2.7b": 2_651_307_520,  # stored public code
    "gpt2": 124_439_808,  # KerasHub presets
    "gpt2-xl": 1_557_611_200,  # KerasHub presets
    "llama-2-7b": 6_738_415_616,  # PEFT's "all params" line
    "llama-2-13b": 13_015_864_320,  # stored public code
    "llama-2-70b": 68_976_648_192,  # stored public code
    "llama-3-8b": 8_030_261_248,  # stored public code
    "llama-3.1-8b": 8_030_261_248,  # stored public code, keyed by meta-llama/Llama-3.1-8B
    "llama-3.1-70b": 70_553_706_496,  # the hub's safetensors total
    "llama-3.2-3b": 3_212_749_824,  # PEFT benchmark: num_total_params - num_trainable_params
    "mistral-7b": 7_241_732_096,  # stored public code
    "pythia-1.4b": 1_414_647_808,  # the model card's table of Pythia
    "roberta-large": 355_412_057,  # the hub's listing of F32 tensors
    "qwen2.5-3b": 3_085_938_688,  # stored public code
    "qwen2.5-7b": 7_615_616_512,  # stored public code
    "qwen2.5-14b": 14_770_033_664,  # stored public code
    "qwen2.5-32b": 32_763_876_352,  # stored public code
    "smollm2-135m": 134_515_008,  # stored public code
    "smollm2-360m": 361_821_120,  # stored public code
    "smollm2-1.7b": 1_711_376_384,  # stored public code
    "tinyllama-1.1b": 1_100_048_384,  # the hub's safetensors total
    # llm-foundry's table of its benchmarks (scripts/train/benchmarking), at 2,048 positions
    "llm-foundry-mpt-125m": 125_311_488,
    "llm-foundry-mpt-350m": 355_985_408,
    "llm-foundry-mpt-760m": 760_470_528,
    "llm-foundry-mpt-1b": 1_315_950_592,
    "llm-foundry-mpt-3b": 2_651_837_440,
    "llm-foundry-mpt-7b": 6_658_859_008,
    "llm-foundry-mpt-13b": 12_853_954_560,
    "llm-foundry-mpt-30b": 29_975_214_080,
    "llm-foundry-mpt-70b": 64_862_437_376,
    # All of the following: stored public code, on 2026-11-29.
    "deepseek-coder-1.3b": 1_346_471_936,
    "deepseek-coder-6.7b": 6_740_512_768,
    "deepseek-llm-7b": 6_910_365_696,
    "deepseek-r1-qwen-1.5b": 1_777_088_000,
    "distilgpt2": 81_912_576,
    "gemma-2-27b": 27_227_128_320,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3-70b": 70_553_706_496,
    "ministral-8b": 8_019_808_256,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2-72b": 72_706_203_648,
    "glm-4-9b-0414": 9_400_279_040,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "granite-3.3-8b": 8_170_864_640,
    "mixtral-8x7b": 46_702_792_704,
    "olmo-2-32b": 32_234_279_936,
    "phi-4": 14_659_507_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm3-3b": 3_075_098_624,
    "stablelm-2-1.6b": 1_644_515_328,
    "solar-10.7b": 10_731_524_096,
    "yi-6b": 6_061_035_520,
    "yi-9b": 8_829_407_232,
    "yi-1.5-34b": 34_388_917_248,
}
# Of models that are traced alone, in billions: their cards, papers or listings, 2026-11-30. Layers that predict further
# tokens, which transformers does not build, are not among them.
IN_BILLIONS = {
    "afm-4.5b": 4.62,  # the hub's listing
    "deepseek-v4-flash": 284,  # NVIDIA-NeMo/Megatron-Bridge, docs
    "gemma-4-26b-a4b": 25.8,  # its card: 25.2, and 0.57 of the vision encoder
    "glm-4.5-air": 106,  # NVIDIA-NeMo/Megatron-Bridge, docs
    "glm-4.6v-flash": 10.3,  # GLM-4.1V-9B-Thinking, whose dims it has
    "glm-5.2": 744,  # GLM-5's card
    "minimax-m2": 229,  # the hub's listing
    "nemotron-mini-4b": 4.19,  # Minitron-4B-Base, the hub's listing
    "paddleocr-vl-1.6": 0.9,  # its card
    "qwen3-next-80b-a3b": 80,  # its card
    "qwen3.5-122b-a10b": 122,  # its name; with the vision encoder
}
# Of models that are traced: what transformers builds of the config has as many.
TRACED = {
    "lfm2-vl-450m": 450_822_656,  # the hub's safetensors total, as the following, on 2026-11-30
    "gemma-3-4b-vision": 4_300_079_472,
    "gemma-3-12b-vision": 12_187_325_040,
    "gemma-3-27b-vision": 27_432_406_640,
    "llama-4-scout-17b-16e": 108_641_793_536,
    "llama-4-scout-17b-16e-linearized": 108_641_793_536,  # its experts cut into layers
    "llama-4-maverick-17b-128e": 401_583_781_376,  # Fireworks' catalogue
    "mistral-medium-3.5-128b": 127_704_210_176,
    "nemotron-3-nano-30b-a3b": 31_577_937_344,
    "nemotron-3-super-120b-a12b": 123_611_012_096 - 2_942_324_736,  # without layers that predict a further token
    "trinity-nano": 6_120_003_328,
}
BUILT = {
    "bert-base": 109_514_298, "bert-large": 335_174_458, "gpt-neo-1.3b": 1_315_575_808,
    "roberta-base": 124_697_433, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt3-xl": 2_879_554_560, "gpt3-2.7b": 2_651_553_280,
    "llama-3.2-1b": 1_235_814_400, "mistral-7b-v0.3": 7_248_023_552, "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080, "opt-2.7b": 2_651_596_800, "opt-6.7b": 6_658_473_984, "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-7b": 7_721_324_544, "qwen-1.8b": 1_836_828_672, "qwen-7b": 7_721_324_544,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "bert-base-cased": 108_340_804, "bert-large-cased": 333_610_308, "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160, "codellama-70b": 68_976_910_336, "codestral-22b": 22_247_282_688,
    "deepseek-coder-33b": 33_342_991_360, "falcon3-1b": 1_669_408_768, "falcon3-3b": 3_227_655_168,
    "falcon3-7b": 7_455_550_464, "falcon3-10b": 10_305_653_760, "gpt-neo-125m": 125_198_592,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-30b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama-3.3-70b": 70_553_706_496, "mathstral-7b": 7_248_023_552, "mistral-7b-v0.2": 7_241_732_096,
    "mistral-large-123b": 122_610_069_504, "mistral-small-22b": 22_247_282_688, "open-llama-3b": 3_426_473_600,
    "open-llama-7b": 6_738_415_616, "open-llama-13b": 13_015_864_320, "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288, "opt-66b": 65_719_701_504, "qwen1.5-0.5b": 463_987_712, "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-72b": 72_287_920_128, "qwen1.5-110b": 111_209_914_368, "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512, "smollm-135m": 134_515_008, "smollm-360m": 361_821_120,
    "smollm-1.7b": 1_711_376_384, "yi-34b": 34_388_917_248, "yi-1.5-6b": 6_061_035_520, "yi-1.5-9b": 8_829_407_232,
    "mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184, "deepseek-v2-lite": 15_706_484_224, "deepseek-v2.5": 235_741_434_880,
    "deepseek-v3": 671_026_404_352, "glm-4.7-flash": 29_943_390_976,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2b": 2_506_172_416, "gemma-3-1b": 999_885_952,
    "phi-4": 14_659_507_200, "phi-4-mini": 3_836_021_760, "olmo-2-7b": 7_298_617_344, "olmo-3-7b": 7_298_011_136,
    "aya-23-8b": 8_028_033_024, "starcoder2-7b": 7_173_923_840, "stablelm-2-1.6b": 1_644_515_328,
    "smollm3-3b": 3_075_098_624, "glm-4-9b": 9_399_951_360,
    "phi-2": 2_779_683_840, "falcon-7b": 6_921_720_704, "mpt-7b": 6_649_286_656, "mpt-30b": 29_957_200_896,
    "starcoderbase-1b": 1_137_207_296, "distilbert-base": 66_985_530, "t5-base": 222_903_552,
    "t5-small": 60_506_624, "t5-large": 737_668_096, "flan-t5-small": 76_961_152, "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,  # with a head of its own, as in its checkpoint
    "command-r-35b": 34_980_831_232, "falcon-40b": 41_303_293_952, "gemma-7b": 8_537_680_896,
    "gemma-3-270m": 268_098_176, "gemma-3-4b": 3_880_263_168, "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304, "gemma-3-4b-vision": 3_880_263_168, "gemma-3-12b-vision": 11_766_034_176,
    "gemma-3-27b-vision": 27_009_346_304, "mixtral-8x22b": 140_630_071_296, "olmo-2-1b": 1_484_916_736,
    "olmo-2-13b": 13_716_198_400, "phi-1.5": 1_418_270_720, "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "qwen3-235b-a22b": 235_093_634_560,
    "stablelm-3b-4e1t": 2_795_443_200,
    "cerebras-gpt-1.3b": 1_315_723_264, "phi-3.5-mini": 3_821_079_552, "starcoder2-3b": 3_030_371_328,
    "llama-3-8b-pro": 9_775_157_248, "starcoder2-15b": 15_957_889_024, "glm-4-32b-0414": 32_566_081_536,
    "skywork-reward-v2-8b": 7_568_409_600,
    "redpajama-incite-3b": 2_775_864_320, "seed-oss-36b": 36_151_104_512,
    "command-r7b": 8_028_033_024, "orpheus-3b": 3_300_867_072, "mimo-7b": 7_622_619_136, "xgen-7b": 6_895_702_016,
}  # fmt: skip
