"""DeepSpeed ZeRO 0-3 behind the engine's calls (arXiv:1910.02054), as an oracle and a rival.

It is used as its users use it: `deepspeed.initialize`, then `engine(...)`, `engine.backward` and `engine.step` for each
micro-batch. Its master weights are float32, so float64 is refused. It needs the package: pip install 'dist-llm[deepspeed]'.

Where it does not do what one would expect, and what is done about it here:
- it averages gradients over ranks, and over micro-batches unless told: losses are scaled up, `scale_wrt_gas=False`;
- it clips at 1.0 where nothing is said: the clip value is always given;
- it links the optimizer state of the first parameter group only (zero 1 and 2): moments are made here, and read in place;
- on CPU it compiles a shared-memory collective at the first start (80 s, needs a C++ compiler) that only its inference
  uses: switched off;
- it logs and prints to stdout, which belongs to the results: moved to stderr;
- it makes reduction buckets of half a billion elements for any model: cut to the model.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from dist_llm.engines.native import Read
from dist_llm.engines.whole import WholeEngine, torch_optimizer
from dist_llm.errors import UsageError
from dist_llm.model.transformer import Context

BUCKET = 500_000_000  # elements, DeepSpeed's own default


def prepare_environment(device: torch.device) -> None:
    """Writes what DeepSpeed reads from the environment: before its first import. Nothing of ours reads it."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)


def load_package(device: torch.device) -> Any:
    """The deepspeed package, ready for a device. Raises UsageError where it is not installed."""
    prepare_environment(device)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # its logger keeps the stdout that it finds now
            import deepspeed
    except ImportError as error:
        what, install = "engine=deepspeed needs the deepspeed package", "pip install 'dist-llm[deepspeed]'"
        raise UsageError(what, where="layout.engine", found=str(error), next=install) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)  # it calls the old names
    return deepspeed


class DeepSpeedEngine(WholeEngine):
    """One-stage layouts with zero 0-3. Weights are float32, or bfloat16 with float32 gradients and masters (zero 1-3)."""

    name = "deepspeed"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:  # type: ignore[override]
        """bfloat16 needs a ZeRO stage: without one DeepSpeed adds gradients up in bfloat16."""
        return (torch.float32, torch.bfloat16) if self.mesh.layout.zero else (torch.float32,)

    def _wrap(self) -> None:
        deepspeed = load_package(self.device)
        self.tools = deepspeed.utils
        self.stage = self.mesh.layout.zero
        self.optimizer = torch_optimizer(self.whole, self.config)
        with contextlib.redirect_stdout(sys.stderr):
            self.engine, *_ = deepspeed.initialize(model=self.whole, optimizer=self.optimizer, config=self._settings())
        self.parts = self._flat_parts()
        self._start_moments(self.parts or self.whole.by_name.values())

    def _settings(self) -> dict[str, Any]:
        numel = sum(slot.numel for slot in self.whole.slots.values())
        zero = {
            "stage": self.stage,
            "reduce_bucket_size": min(BUCKET, numel),
            "stage3_param_persistence_threshold": 0,  # zero=3 shards every weight, however small
        }
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": self.config.clip,
            "zero_allow_untested_optimizer": True,  # SGD
            "zero_optimization": zero,
        }
        if self.dtype == torch.bfloat16:
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        return settings

    def _flat_parts(self) -> list[Tensor]:
        """The flat float32 tensors that DeepSpeed's optimizer updates on this rank; none in stage 0."""
        for place in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
            if self.stage and hasattr(self.engine.optimizer, place):  # zero 1 and 2; zero 1 in bfloat16; zero 3
                return list(getattr(self.engine.optimizer, place))
        assert self.stage == 0
        return []

    def _loss(self, context: Context) -> Tensor:
        return self.engine(context)

    def _micro_batch(self, context: Context, slope: float, *, last: bool) -> Tensor:
        loss = self.engine(context)
        self.engine.backward(loss * slope, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; the update comes at the boundary
        return loss

    def step(self, lr: float) -> None:
        """Clips, updates the weights and shares them; gradients are gone afterwards."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def _range(self, name: str) -> tuple[int, int]:
        parameter, numel = self.whole.by_name[name], self.whole.slots[name].numel
        if self.stage == 0:
            return 0, numel
        if self.stage == 3:  # equal parts, padding at the end
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            start = min(self.mesh.data.index * size, numel)
            return start, min(start + size, numel)
        if parameter._hp_mapping is None:  # type: ignore[attr-defined]
            return 0, 0  # all of it lies in other ranks' parts
        part = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
        return part.start, part.start + part.numel

    def _values(self, kind: str, name: str) -> Tensor | None:
        parameter, key = self.whole.by_name[name], self.moments.get(kind)
        start, stop = self._range(name)
        if start == stop:
            return None
        if self.stage == 0:
            found = self.optimizer.state[parameter][key] if key else {"weight": parameter.data, "gradient": parameter.grad}[kind]
            return None if found is None else found.view(-1)
        if self.stage < 3:
            return self._fragment(parameter, kind, key)
        if key:
            return self.tools.safe_get_local_optimizer_state(parameter, key)[: stop - start]
        read = self.tools.safe_get_local_fp32_param if kind == "weight" else self.tools.safe_get_local_grad
        return read(parameter).view(-1)[: stop - start]

    def _fragment(self, parameter: Any, kind: str, key: str | None) -> Tensor | None:
        """Stages 1 and 2: the owned run of a parameter, in the flat parts."""
        mapping = parameter._hp_mapping
        group, inside, part = mapping.param_group_index, mapping.hp_fragment_address, mapping.lp_fragment_address
        if kind != "gradient":
            flat = self.optimizer.state[self.parts[group]][key] if key else self.parts[group]
            return flat.data.narrow(0, inside.start, inside.numel)
        if mapping.gradient_dict.get(group) is None:
            return None
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        return gradient if gradient.numel() == part.numel else gradient[part.start : part.start + part.numel]

    @torch.no_grad()
    def load_state(self, read: Read, *, count: int) -> None:
        """As WholeEngine; besides the masters, the weights that DeepSpeed computes with are filled."""
        super().load_state(read, count=count)
        for name, slot in self.whole.slots.items():
            parameter, (start, stop) = self.whole.by_name[name], self._range(name)
            if self.stage == 3 and start < stop:
                parameter.ds_tensor.data[: stop - start].copy_(read("weight", name, slot.box, start, stop))  # type: ignore[attr-defined]
            elif self.stage in (1, 2):
                parameter.data.view(-1).copy_(read("weight", name, slot.box, 0, slot.numel))

    def persistent(self) -> dict[str, list[Tensor]]:
        """The tensors that live between steps; float32 weights have a second, master copy in stages 1 to 3."""
        parameters = self.whole.by_name.values()
        weights = [parameter.ds_tensor.data if self.stage == 3 else parameter.data for parameter in parameters]  # type: ignore[attr-defined]
        moments = [value for state in self.optimizer.state.values() for key, value in state.items() if key in self.moments.values()]
        return {"weights": weights, "gradients": [], "optimizer": [*(part.data for part in self.parts), *moments]}
