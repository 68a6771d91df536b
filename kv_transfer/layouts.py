"""What two workers must have in common: the protocol's version, and what the bytes of a block mean."""

from kvrelay.engine.kv_layout import LAYOUT_VERSION, KvLayout
from kvrelay.errors import FailedPrecondition
from kvrelay.v1 import kv_pb2

__all__ = ["PROTOCOL_VERSION", "check_layouts", "check_versions", "layout_to_proto"]

# Of KvService: grows when Pull, its events or what a transport expects of the other end changes its meaning.
PROTOCOL_VERSION = 2


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


def check_versions(theirs: int) -> None:
    """Raises: FailedPrecondition, naming both versions, if they differ; reason VERSION_MISMATCH."""
    if theirs != PROTOCOL_VERSION:
        raise FailedPrecondition(
            f"the KV protocol has version {PROTOCOL_VERSION} here and {theirs} there", reason="VERSION_MISMATCH"
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
