"""The model of a run, from its configuration: spread over this mesh, compiled and filled as that says."""

import os
import shutil

import torch

from ..errors import UserError
from ..kernels.dispatch import choose_backend
from ..kernels.launch import architecture
from ..kernels.tiles import has_tiles
from ..model.lm import HybridLM
from ..parallel.fsdp import materialise
from ..parallel.mesh import Mesh, World
from ..parallel.pipeline import Pipeline
from ..parallel.spread import spread_model
from ..parallel.stages import cut_stages, stages_of_rank
from .config import Config
from .engine import Engine


def parameter_bytes(config: Config) -> int:
    """Bytes of the whole model's parameters, in the dtypes they are kept in."""
    return sum(parameter.nbytes for parameter in build_stage(config, None).parameters())


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype matrices are multiplied in."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.train.precision)


def check_compiler() -> None:
    """Raises UserError where torch.compile would find no compiler (C++ for CPUs; Triton wants one for GPUs too)."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise UserError(f"train.compile=true needs a compiler, and there is no {name}; install g++ or set CXX")


def choose_kernels(config: Config, device: torch.device) -> str:
    """What `train.kernels` comes to on this device.

    Raises:
        UserError: Triton is asked for and cannot run here.
    """
    x = torch.empty(0, dtype=compute_dtype(config, device), device=device)
    try:
        backend = choose_backend("train.kernels=triton", config.train.kernels, x)
    except ValueError as error:
        raise UserError(str(error), everywhere=True) from None
    if backend != "triton" or has_tiles(architecture(x)):
        return backend
    if config.train.kernels == "triton":
        text = f"train.kernels=triton: there are no tiles for {architecture(x)}; use auto, or run benchmarks/tune.py"
        raise UserError(text, everywhere=True)
    return "torch"


def build_engine(config: Config, mesh: Mesh, world: World) -> Engine:
    """The spread model with its initial values, this rank's stages of it where there is a pipeline.

    Raises:
        UserError: it is to be compiled without a compiler, or run by kernels that cannot run here.
    """
    parallel = config.parallel
    choose_kernels(config, world.device)
    if config.train.compile:
        check_compiler()
    if parallel.pp == 1:
        return Engine(config, world, mesh, [build_model(config, mesh, world.device, None)], None)
    cuts = cut_stages(config.model, parallel.num_stages, config.data.seq_len)
    mine = stages_of_rank(parallel, mesh.rank("pp"))
    models = [build_model(config, mesh, world.device, cuts[stage]) for stage in mine]
    dtype = compute_dtype(config, world.device)
    pipeline = Pipeline(list(zip(mine, models, strict=True)), mesh, parallel, compute_dtype=dtype)
    return Engine(config, world, mesh, models, pipeline)


def build_stage(config: Config, stage: range | None, device: str = "meta") -> HybridLM:
    """A stage of the model, or all of it, in the dtypes its weights are kept in, and without values."""
    with torch.device(device):
        model = HybridLM(config.model, stage)
    if config.train.weights == "bfloat16":
        exact = [m for m in model.modules() if getattr(m, "keep_fp32", False)]
        spared = {parameter for module in exact for parameter in module.parameters()}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in spared:
                    narrow = parameter.detach().to(torch.bfloat16)
                    module.register_parameter(name, torch.nn.Parameter(narrow, parameter.requires_grad))
    return model


def build_model(config: Config, mesh: Mesh, device: torch.device, stage: range | None) -> HybridLM:
    """A stage of the model, or all of it, spread and filled."""
    model = build_stage(config, stage)
    dtype = compute_dtype(config, device)
    if config.train.weights == "bfloat16" and dtype != torch.bfloat16:
        raise UserError(
            f"train.weights=bfloat16 needs bfloat16 products, and on {device.type} precision is float32; "
            "set train.precision=bfloat16",
            everywhere=True,
        )
    spread_model(model, mesh, config.parallel, compute_dtype=dtype, recompute=config.train.recompute)
    materialise(model, device, config.run.seed)
    if config.train.compile:
        for block in model.layers.values():
            block.compile()
    return model
