"""Which library multiplies float32 matrices on a CPU."""

import torch

# (batch, rows, inner, columns): small and large, batched and not.
_PROBES = ((1, 32, 32, 32), (1, 256, 192, 768), (1, 768, 256, 192), (64, 64, 64, 64), (8, 33, 100, 65))


def prefer_onednn() -> bool:
    """Send float32 products on the CPU to oneDNN instead of MKL, where that changes no result; whether it was done.

    MKL takes two to three times as long as oneDNN on processors it was not made for. The only public switch
    that hands oneDNN float32 products is the leave to round inputs to bfloat16; a processor without a unit for
    such products (AMX) computes them in float32 all the same. Probes whose exact result needs all the bits of
    float32 tell: if one differs, the switch is put back. Call once, before training starts; it holds for the process.
    """
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if switch is None or not torch.backends.mkldnn.is_available() or not hasattr(switch, "fp32_precision"):
        return False
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    if all(_is_exact(*shape) for shape in _PROBES):
        return True
    switch.fp32_precision = before
    return False


def _is_exact(batch: int, rows: int, inner: int, columns: int) -> bool:
    """Whether a product of 12-bit integers, exact in float32 and rounded in bfloat16, comes out exact."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-4095, 4096, (batch, rows, inner), generator=generator)
    b = torch.randint(-4, 5, (batch, inner, columns), generator=generator)
    exact = a @ b
    a, b = a.float(), b.float()
    transposed = (a.mT.contiguous().mT, b.mT.contiguous().mT)
    return all(
        torch.equal((x[0] @ y[0] if batch == 1 else x @ y).long().view_as(exact), exact)
        for x, y in ((a, b), transposed)
    )
