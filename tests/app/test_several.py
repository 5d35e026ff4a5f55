"""Which fields of several GPUs the form shows, and that what it does not show is not asked."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jinja2")

from perfmodel.app import several
from perfmodel.app.choices import setup_fields, with_fields
from perfmodel.network import files as nodes
from perfmodel.recording.parallel.offload import check_offload
from perfmodel.setup import PARALLEL, Setup


def deciding(**changes: Any) -> dict[str, Any]:
    """Fields that decide over others, as a form has them."""
    return {"device": "h100-sxm", "gpus": 8, "parallel": "ddp", "tp": 1, "pp": 1, "cp": 1, **changes}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"gpus": 1}, ""),
        ({"gpus": 1, "parallel": "fsdp2"}, ""),
        ({"gpus": 1, "parallel": "zero2"}, "offload"),
        ({"gpus": "8.0"}, "nodes node tp pp ddp"),
        ({"pp": 2}, "nodes node tp pp pp_schedule"),
        ({"tp": 8}, "nodes node tp pp"),
        ({"parallel": "fsdp2"}, "nodes node tp pp cp offload"),
        ({"parallel": "fsdp2", "cp": "2"}, "nodes node tp pp cp cp_rotate"),
        ({"parallel": "fsdp2", "pp": 2}, "nodes node tp pp cp pp_schedule"),
        ({"parallel": "fsdp2", "pp": 2, "cp": 2}, "nodes node tp pp cp pp_schedule cp_rotate"),
        ({"parallel": "zero3", "cp": 2}, "nodes node tp cp cp_rotate"),
        ({"parallel": "zero1"}, "nodes node tp cp offload"),
        ({"parallel": "zero3", "tp": 2}, "nodes node tp cp"),
        ({"parallel": "fsdp1", "cp": 2}, "nodes node tp offload"),
        ({"gpus": "many"}, ""),
    ],
)
def test_a_field_is_shown_where_it_means_something(changes: dict[str, Any], shown: str) -> None:
    """Whoever has one GPU is not asked for pipelines, nor FSDP for DDP's graph."""
    found = several.offered(deciding(**changes))
    assert [name for name in several.FIELDS if name in found] == shown.split()
    usual = setup_fields()
    for name, offers in found.items():
        by_heads = name == "cp_rotate" and changes["parallel"].startswith("zero")  # the one way there
        assert offers[0] == ("ulysses" if by_heads else several.AS_USUAL if usual[name] is None else usual[name])


forms = st.fixed_dictionaries(
    {
        "gpus": st.sampled_from((1, 2, 8, 12)), "parallel": st.sampled_from(PARALLEL),
        **{name: st.sampled_from((1, 2)) for name in several.COUNTS},
        **{name: st.sampled_from(values) for name, values in several.CLOSED.items()},
        "nodes": st.sampled_from(("none", 1, 2)), "pp_schedule": st.sampled_from(several.SCHEDULES),
    }
)  # fmt: skip


@given(forms)
def test_no_field_that_is_not_shown_decides_over_the_answer(form: dict[str, Any]) -> None:
    """Else a refusal would speak of what nobody can see, such as what DDP had offloaded."""
    typed = deciding(**form)
    asked = several.meant(form, typed)
    usual, offers = setup_fields(), several.offered(typed)
    for name in several.FIELDS:
        value = asked.get(name, usual[name])
        assert name in offers or value == usual[name]
        assert name not in several.CLOSED or value in (offers.get(name) or (usual[name], several.AS_USUAL))
    shared = math.prod(asked.get(name, usual[name]) for name in several.COUNTS)
    if form["gpus"] % shared == 0:  # else there is no such job
        check_offload(with_fields(Setup(), {name: str(value) for name, value in asked.items()}))


def test_what_nobody_offers_is_left_to_be_refused() -> None:
    """A word that was typed is complained of, not passed over."""
    usual = {name: several.AS_USUAL if value is None else value for name, value in setup_fields().items()}
    form = {name: usual[name] for name in several.FIELDS} | {"ddp": "fast", "offload": "params"}
    asked = several.meant(form, deciding())
    assert asked["ddp"] == "fast"
    assert "offload" not in asked


@pytest.mark.parametrize("device", ["h100-sxm", "l40s", "t4"])
def test_the_nodes_of_a_gpu_are_offered(device: str) -> None:
    """Those that hold such GPUs; of a GPU that no node is known to hold, all of them."""
    found = {nodes.load(name).gpu for name in several.nodes_of(device)}
    assert found == {device} or (device == "t4" and len(found) > 5)
