"""Which processors multiply bfloat16 faster than float32."""

import pytest

from simplernn_jax.ops import native as processor


@pytest.mark.parametrize(
    ("lines", "is_fast"),
    [
        (("flags\t\t: fma avx512_bf16 amx_bf16", "vendor_id\t: GenuineIntel"), True),
        (("flags\t\t: fma avx512_bf16", "vendor_id\t: GenuineIntel"), False),
        (("flags\t\t: fma avx512_bf16", "vendor_id\t: AuthenticAMD"), True),
        (("flags\t\t: fma avx2", "vendor_id\t: AuthenticAMD"), False),
        ((), False),
    ],
)
def test_bfloat16_is_fast_with_amx_and_on_amd_with_avx512(monkeypatch, lines, is_fast):
    monkeypatch.setattr(processor, "processor_lines", lambda: lines)
    assert processor.has_fast_bfloat16.__wrapped__() == is_fast  # not from the cache
