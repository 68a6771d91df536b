"""The layout fingerprint: two workers exchange blocks only if they mean the same by their bytes."""

from kvrelay.engine.kv_layout import LAYOUT_VERSION, KvLayout
from kvrelay.errors import FailedPrecondition
from kvrelay.v1 import kv_pb2

__all__ = ["check_layouts", "layout_to_proto"]


def layout_to_proto(layout: KvLayout) -> kv_pb2.KvLayout:
    return kv_pb2.KvLayout(
        version=LAYOUT_VERSION,
        model_digest=layout.model_digest,
        dtype=layout.dtype,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
    )


def check_layouts(mine: kv_pb2.KvLayout, theirs: kv_pb2.KvLayout) -> None:
    """Compares field by field, those included that only a later version of the proto has.

    Raises:
        FailedPrecondition: naming the first field that differs and both values; reason LAYOUT_MISMATCH.
    """
    for field in kv_pb2.KvLayout.DESCRIPTOR.fields:
        one, other = getattr(mine, field.name), getattr(theirs, field.name)
        if one != other:
            raise FailedPrecondition(
                f"the KV layouts differ in {field.name}: {_show(one)} here, {_show(other)} there",
                reason="LAYOUT_MISMATCH",
                metadata={"field": field.name},
            )


def _show(value: object) -> str:
    return value.hex()[:16] or "none" if isinstance(value, bytes) else repr(value)
