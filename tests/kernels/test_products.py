"""The choice of the library for float32 products: only one that computes in float32."""

from collections.abc import Iterator

import pytest
import torch

from headrace.kernels import products


@pytest.fixture(autouse=True)
def switch_as_before() -> Iterator[None]:
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    yield
    switch.fp32_precision = before


def test_products_stay_as_exact_as_float32() -> None:
    products.prefer_onednn()
    a, b = torch.randn(2, 4, 200, 300, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double().mT
    for product in (a @ b.mT, torch.stack([x @ y.mT for x, y in zip(a, b, strict=True)])):
        assert (product - exact).norm() <= 1e-6 * exact.norm()


def test_a_library_that_rounds_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(products, "_is_exact", lambda *shape: False)
    assert not products.prefer_onednn()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_probes_tell_bfloat16_from_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products._is_exact(1, 32, 32, 32)
    plain = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: plain(x.bfloat16()))
    assert not products._is_exact(1, 32, 32, 32)
    assert not products._is_exact(8, 33, 100, 65)
