"""The versions of the software that a step runs under, and what they decide.

Attention of `scaled_dot_product_attention` in 16 bit: cuDNN's kernel was the first choice on Hopper in PyTorch 2.5.0,
had to be asked for from 2.5.1 on (https://github.com/pytorch/pytorch/pull/138522), is the first choice again on compute
capability 9.0 and 10.0 since 2.9 (/pull/162073) and on 10.3 since 2.11 (/pull/170800), but since 2.10 only with cuDNN
9.15.1 or later (/pull/171895). Wheels have that for CUDA 13 since 2.10 (/pull/171189) and for CUDA 12.8 since 2.11
(https://github.com/huggingface/transformers/pull/48163); those for CUDA 12.6 keep 9.10.2 (/issues/190355).
FlashAttention is the second one since 2.2 (/releases/tag/v2.2.0).

Lists of tensors (foreach and fused optimizers, clipping): a launch has 32 KiB of arguments in place of 4 in builds of
PyTorch since 2.12 for CUDA 13 (/pull/178641: 2,240 chunks in place of 320), which run from compute capability 7.5 on
(/pull/175253).

PEFT keeps adapters in fp32 beside a 16-bit base since 0.12 (https://github.com/huggingface/peft/pull/1706); before,
they got the base's dtype (`update_layer` of v0.11.0).

transformers hands grouped keys and values to the kernel as they are since 4.54 and with PyTorch 2.5 or later
(https://github.com/huggingface/transformers/pull/39412), before it repeated them for every head; before 4.49 its loss
copied the logits of all tokens but the last (/pull/35646); before 5.0 it looped over experts.

cuBLAS's 16-bit products on Hopper got faster in CUDA 12.6 Update 2 (release notes of CUDA 12.9.1,
https://docs.nvidia.com/cuda/archive/12.9.1/cuda-toolkit-release-notes/, cuBLAS 12.6 Update 2); PyTorch's wheels have
it from 2.7 on, and 2.6 where it is built for CUDA 12.6 (https://github.com/pytorch/pytorch/issues/138440).

Liger's fused loss adds to the weight's gradient by one product until 0.6.1, from 0.6.2 to 0.8.2 by a product, a copy of
it in fp32 and a sum (of weights in 16 bit; of fp32 ones under autocast until 0.8.0), and by one product again since
0.8.3, which also keeps one buffer for the logits of all chunks and writes products where they belong; norms compute no
gradient of a frozen weight since 0.8.5 (linkedin/Liger-Kernel, ops/fused_linear_cross_entropy.py and rms_norm.py of
these releases).

What else differs between versions, such as contiguous copies before attention, small kernels of rotary positions and
masks, or the program of older optimizers, is left out.
"""

import re
from collections.abc import Mapping
from typing import NoReturn

from ..errors import UserError, nearest
from ..values import immutable

Version = tuple[int, int, int]

_FIRST = {"torch": (2, 0, 0), "cuda": (11, 7, 0), "transformers": (4, 36, 0), "peft": (0, 3, 0), "liger": (0, 5, 0)}
_NUMBER = r"([0-9]{1,3})(?:\.([0-9]{1,3}))?(?:\.([0-9]{1,3}))?(?:[.+-]?[a-z][a-z0-9.+]*)?"
_BUILD = r"\+cu([0-9]{2})([0-9])$"  # of PyTorch's versions, such as 2.6.0+cu124
# CUDA of the wheels that pip takes, from a version of PyTorch on (RELEASE.md; 2.11: /pull/177975)
_BUILT_FOR = {
    (2, 11): (13, 0, 0), (2, 8): (12, 8, 0), (2, 7): (12, 6, 0), (2, 5): (12, 4, 0), (2, 1): (12, 1, 0),
    (2, 0): (11, 7, 0),
}  # fmt: skip
_CUDNN_CARDS = ("9.0", "10.0", "10.3")
LONG_ARGUMENTS = 7  # times as many tensors and chunks of a list fit into 32 KiB of arguments as into 4


@immutable
class SoftwareStack:
    """Versions as (major, minor, patch); `cuda` is what PyTorch is built for. The default is current.

    >>> SoftwareStack.of("torch=2.6").words
    'torch 2.6, CUDA 12.4, transformers 5.24, peft 0.21'
    """

    torch: Version = (2, 13, 0)
    cuda: Version = (13, 0, 0)
    transformers: Version = (5, 24, 0)
    peft: Version = (0, 21, 0)
    liger: Version = (0, 8, 5)

    @classmethod
    def of(cls, given: "SoftwareStack | str | Mapping[str, str]") -> "SoftwareStack":
        """The stack of `torch=2.6,cuda=12.4,…`, of its `as_dict`, or "current"; what is left out is current.

        Without `cuda` PyTorch is the build that pip takes, or the one that its version names (2.6.0+cu126).

        Raises:
            UserError: a package or version that is unknown, or a build that there is not.
        """
        if isinstance(given, SoftwareStack):
            return given
        versions = {name: _version(name, told) for name, told in _told(given).items()}
        torch = versions.setdefault("torch", cls.torch)
        versions.setdefault("cuda", next(cuda for since, cuda in _BUILT_FOR.items() if torch >= since))
        made = cls(**versions)
        if made.cuda >= (13,) and torch < (2, 9):
            _fail(f"torch {_short(torch)} has no build for CUDA 13, which began with torch 2.9; leave cuda out")
        return made

    @classmethod
    def installed(cls, versions: Mapping[str, str | None]) -> "SoftwareStack":
        """The stack of versions as packages and PyTorch itself tell them, of other packages, too; current ones where
        they are not known."""
        told = {"liger": versions.get("liger-kernel"), **versions}
        try:
            return cls.of({name: version for name, version in told.items() if version and name in _FIRST})
        except UserError:
            return CURRENT

    def prefers_cudnn(self, capability: str) -> bool:
        """Whether attention in 16 bit tries cuDNN's kernel first on a card of that compute capability."""
        if self.torch == (2, 5, 0):
            return int(capability.split(".")[0]) >= 9
        if self.torch < (2, 9) or capability not in _CUDNN_CARDS[: 3 if self.torch >= (2, 11) else 2]:
            return False
        built_with_it = (13,) if self.torch >= (2, 10) else (11,)
        return self.cuda >= ((12, 8) if self.torch >= (2, 11) else built_with_it)

    @property
    def early_products(self) -> bool:
        """Whether cuBLAS is older than CUDA 12.6 Update 2, which made 16-bit products on Hopper faster.

        PyTorch's builds for CUDA 12.6 have Update 3 (https://github.com/pytorch/pytorch/issues/138440).
        """
        return self.cuda < (12, 6)

    def depends_on_versions(self, capability: str) -> bool:
        """Whether which attention kernel a card of that compute capability runs is another in another stack."""
        return capability in _CUDNN_CARDS

    def list_room(self, capability: str) -> int:
        """How many times what 4 KiB of arguments hold one launch over lists takes; CUDA 13 has no card before 7.5."""
        long = self.cuda >= (13,) and self.torch >= (2, 12)
        return LONG_ARGUMENTS if long and tuple(map(int, capability.split("."))) >= (7, 5) else 1

    @property
    def upcasts_adapters(self) -> bool:
        """Whether adapters beside a 16-bit base are in fp32 (`autocast_adapter_dtype`)."""
        return self.peft >= (0, 12)

    @property
    def streams_downcasts(self) -> bool:
        """Whether a copy of fp32 to 16 bits takes several elements at once, without a look at the dtype for each.

        https://github.com/pytorch/pytorch/pull/137053; the other way round only for AMD's cards (pull/195542).
        """
        return self.torch >= (2, 6)

    @property
    def groups_heads(self) -> bool:
        """Whether sdpa without a mask gets grouped keys and values as they are (`enable_gqa`)."""
        return self.transformers >= (4, 54) and self.torch >= (2, 5)

    @property
    def shifts_logits(self) -> bool:
        """Whether the loss of a causal model copies the logits of all tokens but the last."""
        return self.transformers < (4, 49)

    @property
    def checkpoints_around_blocks(self) -> bool:
        """Whether a model checkpoints the calls of its blocks, hooks included, not what a block does when it is called
        (`GradientCheckpointingLayer`)."""
        return self.transformers < (4, 52)

    @property
    def loops_experts(self) -> bool:
        """Whether a mixture can only loop over its experts."""
        return self.transformers < (5,)

    @property
    def liger_sums_apart(self) -> bool:
        """Whether Liger's loss adds to the weight's gradient by a product, a copy in fp32 and a sum."""
        return self.liger >= (0, 6, 2)

    @property
    def liger_adds_in_fp32(self) -> bool:
        """Whether to one in fp32 it adds 16-bit products without a copy."""
        return self.liger >= (0, 8, 1)

    @property
    def liger_keeps_logits(self) -> bool:
        """Whether it has one buffer for logits, and adds to a 16-bit gradient as to one in fp32."""
        return self.liger >= (0, 8, 3)

    @property
    def liger_leaves_frozen_norms(self) -> bool:
        """Whether Liger's norms form no gradient of a frozen weight."""
        return self.liger >= (0, 8, 5)

    @property
    def words(self) -> str:
        """The versions in words."""
        return _in_words(self.as_dict())

    @property
    def other_words(self) -> str:
        """The versions that are not current, in words."""
        current = CURRENT.as_dict()
        return _in_words({name: version for name, version in self.as_dict().items() if version != current.get(name)})

    def as_dict(self) -> dict[str, str]:
        """Versions by package, as text; Liger's, which few runs have, where it is not current."""
        told = {name: _short(getattr(self, name)) for name in _FIRST}
        return {name: text for name, text in told.items() if name != "liger" or self.liger != type(self).liger}


CURRENT = SoftwareStack()


def _told(given: str | Mapping[str, str]) -> dict[str, str]:
    """Versions by package, that of PyTorch's build among them."""
    if isinstance(given, str):
        pairs = [] if given == "current" else [item.partition("=")[::2] for item in given.split(",")]
    elif isinstance(given, Mapping):
        pairs = [(str(name), str(version)) for name, version in given.items()]
    else:
        _fail(f"{given!r} is none: write PACKAGE=VERSION,… such as torch=2.6,cuda=12.4")
    told: dict[str, str] = {}
    for name, version in pairs:
        name = name.strip()
        if not version:
            _fail(f"{name!r} has no version: write PACKAGE=VERSION,… such as torch=2.6,cuda=12.4")
        if name not in _FIRST:
            _fail(f"package {name!r} is unknown: {nearest(name, _FIRST)}")
        if name in told:
            _fail(f"{name} is given twice")
        told[name] = version.strip()
    build = re.search(_BUILD, told.get("torch", ""))
    return {"cuda": ".".join(build.groups()), **told} if build else told


def _version(name: str, told: str) -> Version:
    match = re.fullmatch(_NUMBER, told)
    if match is None:
        _fail(f"{name} {told!r} is no version such as {_short(getattr(CURRENT, name))}")
    major, minor, patch = (int(number or 0) for number in match.groups())
    first, current = _FIRST[name], getattr(CURRENT, name)
    if (major, minor, patch) < first or major > current[0]:
        _fail(f"{name} {told} is unknown: from {_short(first)} to {current[0]}.x, today {_short(current)}")
    return major, minor, patch


def _in_words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{'CUDA' if name == 'cuda' else name} {version}" for name, version in versions.items())


def _short(version: Version) -> str:
    return ".".join(map(str, version if version[2] else version[:2]))


def _fail(fault: str) -> NoReturn:
    raise UserError(f"stack: {fault}")
