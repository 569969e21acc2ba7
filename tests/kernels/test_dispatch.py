"""Which backend an operator takes, and what it says when it cannot."""

import pytest
import torch

from headrace.kernels import swiglu
from headrace.kernels.dispatch import choose_backend, use_backend
from headrace.kernels.launch import record_launches

X = torch.ones(2, 4)


def test_auto_is_pytorch_without_a_gpu() -> None:
    assert choose_backend("op", "auto", X) == "torch"


def test_a_run_chooses_for_calls_that_do_not() -> None:
    with use_backend("reference"):
        assert choose_backend("op", "auto", X) == "reference"
        assert choose_backend("op", "torch", X) == "torch"
    assert choose_backend("op", "auto", X) == "torch"


def test_a_call_that_names_no_backend_takes_the_runs_also_when_compiled() -> None:
    compiled = torch.compile(lambda x: swiglu(x, x), fullgraph=True, backend="aot_eager")
    for backend, launched in (("torch", 0), ("triton", 1), ("torch", 0)):
        with use_backend(backend), record_launches() as launches:
            compiled(X)
        assert len(launches) == launched


@pytest.mark.parametrize(
    ("x", "obstacle", "message"),
    [
        (X.double(), None, "op: Triton cannot run: float64 inputs have no Triton path; ask for"),
        (X.bfloat16(), None, "interpreted kernels take float32 only"),
        (X, "d_state=512 is above 256", "op: Triton cannot run: d_state=512 is above 256"),
    ],
)
@pytest.mark.interpreted
def test_triton_is_refused_with_the_reason(x: torch.Tensor, obstacle: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend("op", "triton", x, obstacle)


def test_triton_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="tensors are on cpu, kernels run on GPUs"):
        choose_backend("op", "triton", X)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="backend='cuda' is not known; use one of auto, reference, torch, triton"):
        choose_backend("op", "cuda", X)
    with pytest.raises(ValueError, match="backend='cuda'"), use_backend("cuda"):
        pass


def test_auto_on_a_gpu_says_once_when_it_does_without_triton() -> None:
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float32})()
    with pytest.warns(UserWarning, match="op runs without its Triton kernel: d_state=512"):
        assert choose_backend("op", "auto", on_gpu, "d_state=512") == "torch"  # type: ignore[arg-type]
