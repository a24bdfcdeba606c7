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
- it makes reduction buckets of half a billion elements for any model: cut to the model;
- with bfloat16 weights it sends gradients in bfloat16: told float32, as everybody else here;
- its own Adam for the host is compiled at the first start (minutes): taken where it was installed with the package
  (DS_BUILD_CPU_ADAM=1), else torch's fused one updates what is offloaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

from dist_llm.engines.deepspeed_package import load_package
from dist_llm.engines.native import Read, Totals, Wanted
from dist_llm.engines.whole import WholeEngine, decay_groups, torch_optimizer
from dist_llm.errors import UsageError
from dist_llm.model.transformer import Context

BUCKET = 500_000_000  # elements, DeepSpeed's own default


def claim_disk(deepspeed: Any, folder: str, *, rank: int) -> IO[str]:
    """Makes a folder this rank's to offload to, for as long as the returned file is open: DeepSpeed's names in it are fixed.

    Raises UsageError where libaio is missing, through which alone DeepSpeed reads and writes, and where another job is at it.
    """
    builder = deepspeed.ops.op_builder.AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        what, needs = "DeepSpeed offloads to a disk through libaio", "libaio with its header, and a C++ compiler"
        found = "no program that calls libaio's io_submit can be built here"
        install = "apt install libaio-dev (dnf: libaio-devel), or leave runtime.offload_dir out: host memory"
        raise UsageError(what, where="runtime.offload_dir", expected=needs, found=found, next=install)
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, f"rank-{rank}.lock"), "w")  # noqa: SIM115  open as long as the engine lives
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock of the process: its next engine may take it over
    except OSError as error:
        needs = "a folder on a fast disk that can be written, and no other job's"
        raise UsageError("nothing can be offloaded there", where="runtime.offload_dir", expected=needs, found=str(error)) from error
    return lock


class DeepSpeedEngine(WholeEngine):
    """One-stage layouts with zero 0-3. Weights are float32, or bfloat16 with float32 gradients and masters (zero 1-3)."""

    name = "deepspeed"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:  # type: ignore[override]
        """bfloat16 needs a ZeRO stage: without one DeepSpeed adds gradients up in bfloat16."""
        return (torch.float32, torch.bfloat16) if self.mesh.layout.zero else (torch.float32,)

    def _wrap(self) -> None:
        deepspeed = load_package(self.device)
        if self.offload and self.offload_dir is not None:
            self.disk = claim_disk(deepspeed, self.offload_dir, rank=self.mesh.rank)
        self.tools = deepspeed.utils
        self.stage = self.mesh.layout.zero
        self.optimizer = self._make_optimizer(deepspeed)
        with contextlib.redirect_stdout(sys.stderr):
            self.engine, *_ = deepspeed.initialize(model=self.whole, optimizer=self.optimizer, config=self._settings())
        self.parts = self._flat_parts()
        self.complete = False  # are there global gradients
        if self.stage == 0:
            self._start_moments(self.whole.by_name.values())
        for index in range(len(self.parts)):
            with self._in_memory(index) as part:
                self._start_moments([part])

    def _make_optimizer(self, deepspeed: Any) -> torch.optim.Optimizer:
        built = deepspeed.git_version_info  # what was compiled at installation, and for which device
        installed = built.installed_ops.get("cpu_adam", False) and built.accelerator_name == self.device.type
        self.own_adam = self.offload and self.config.kind == "adamw" and installed
        if not self.own_adam:
            return torch_optimizer(self.whole, self.config, offload=self.offload)
        rule: dict[str, Any] = {"lr": self.config.lr, "betas": self.config.betas, "eps": self.config.eps}
        return deepspeed.ops.adam.DeepSpeedCPUAdam(decay_groups(self.whole, self.config), **rule)

    def _count(self, updates: int) -> Any:
        return updates if self.own_adam else super()._count(updates)

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
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero | self._offload_settings(),
        }
        if self.dtype == torch.bfloat16:
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        return settings

    def _offload_settings(self) -> dict[str, Any]:
        """What lies on the host, in memory (pinned beside a CUDA device) or on its disk."""
        place: dict[str, Any] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.offload_dir is not None:
            place |= {"device": "nvme", "nvme_path": self.offload_dir}
        weights = {**place, "buffer_size": max(slot.numel for slot in self.whole.slots.values())}
        kinds = {"none": {}, "optimizer": {"offload_optimizer": place}, "all": {"offload_optimizer": place, "offload_param": weights}}
        return kinds[self.mesh.layout.offload]

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
        self.complete = last
        if not last:
            self.engine.step()  # counts the micro-batch; the update comes at the boundary
        return loss

    def finish_gradients(self) -> Totals:
        """Returns the summed loss and the norm of the global gradient, equal on all ranks."""
        if self.offload and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # gradients are on their way to the host; DeepSpeed itself waits in its step
        return super().finish_gradients()

    def step(self, lr: float) -> None:
        """Clips, updates the weights and shares them; gradients are gone afterwards."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self.complete = False

    def _range(self, name: str) -> tuple[int, int]:
        parameter, numel = self.whole.by_name[name], self.whole.slots[name].numel
        if self.stage == 0:
            return 0, numel
        if self.stage == 3:  # equal parts, padding at the end
            size = parameter.partition_numel()  # type: ignore[attr-defined]
            start = min(self.mesh.data.index * size, numel)
            return start, min(start + size, numel)
        if parameter._hp_mapping is None:  # type: ignore[attr-defined]
            return 0, 0  # all of it lies in other ranks' parts
        part = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
        return part.start, part.start + part.numel

    def _values(self, kind: str, name: str) -> Tensor | None:
        parameter, key = self.whole.by_name[name], self.moments.get(kind)
        start, stop = self._range(name)
        if start == stop or (kind == "gradient" and not self.complete):
            return None
        if self.stage == 0:
            found = self.optimizer.state[parameter][key] if key else parameter.data if kind == "weight" else parameter.grad
            assert found is not None
            return found.view(-1)
        if self.stage < 3:
            return self._fragment(parameter, kind, key)
        if kind == "gradient" or self._on_disk(self._place(parameter)[0]):
            return self._copied(parameter, kind, key)[: stop - start]
        return self._part(parameter, key)[: stop - start]

    def _fragment(self, parameter: Any, kind: str, key: str | None) -> Tensor:
        """Stages 1 and 2: the owned run of a parameter, in the flat parts."""
        mapping = parameter._hp_mapping
        group, inside, part = mapping.param_group_index, mapping.hp_fragment_address, mapping.lp_fragment_address
        if kind != "gradient":
            flat = self.optimizer.state[self.parts[group]][key] if key else self.parts[group]
            return flat.data.narrow(0, inside.start, inside.numel)
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        return gradient if gradient.numel() == part.numel else gradient[part.start : part.start + part.numel]

    def _place(self, parameter: Any) -> tuple[int, int, int]:
        """Stage 3: (index of a flat part, start, elements) of this rank's part of a parameter, padding at the end."""
        return self.engine.optimizer.grad_position[self.engine.optimizer.get_param_id(parameter)]

    def _part(self, parameter: Any, key: str | None) -> Tensor:
        """Stage 3: that part of the master weights or a moment, in place."""
        index, start, numel = self._place(parameter)
        flat = self.optimizer.state[self.parts[index]][key] if key else self.parts[index].data
        return flat.narrow(0, start, numel)

    def _copied(self, parameter: Any, kind: str, key: str | None) -> Tensor:
        """Stage 3: that part as DeepSpeed reads it, which fetches it from a disk into a buffer that is soon another's."""
        if key:
            return self.tools.safe_get_local_optimizer_state(parameter, key).clone()
        read = self.tools.safe_get_local_fp32_param if kind == "weight" else self.tools.safe_get_local_grad
        return read(parameter).view(-1).clone()

    def _on_disk(self, index: int) -> bool:
        return self.stage == 3 and self.engine.optimizer._swappable_optimizer_subgroup(index)

    @contextlib.contextmanager
    def _in_memory(self, index: int) -> Iterator[Tensor]:
        """A flat part with its moments, to be written to: what lies on a disk is fetched before and stored after."""
        if self._on_disk(index):
            self.engine.optimizer._optimizer_states_and_gradient_swap_in(index)
        yield self.parts[index]
        if self._on_disk(index):
            self.engine.optimizer._optimizer_states_and_gradient_swap_out(index)

    def wanted(self) -> Iterator[Wanted]:
        """As WholeEngine; besides the masters, below stage 3 the weights that DeepSpeed computes with."""
        for name, slot in self.whole.slots.items() if self.stage < 3 else ():
            yield Wanted("weight", name, slot.box, 0, slot.numel)
        yield from super().wanted()

    @torch.no_grad()
    def load_state(self, read: Read, *, count: int) -> None:
        """As WholeEngine; besides the masters, the weights that DeepSpeed computes with are filled."""
        if self.stage == 3:
            self._load_parts(read)
            self._set_count(count)
            return
        super().load_state(read, count=count)
        for name, slot in self.whole.slots.items():
            self.whole.by_name[name].data.view(-1).copy_(read("weight", name, slot.box, 0, slot.numel))

    def _load_parts(self, read: Read) -> None:
        """Stage 3: one flat part after the other, then the weights from it."""
        names = {parameter: name for name, parameter in self.whole.by_name.items()}
        for index, parameters in enumerate(self.engine.optimizer.fp16_groups):
            with self._in_memory(index):
                for name in (names[parameter] for parameter in parameters):
                    start, stop = self._range(name)
                    for kind in ("weight", *self.moments) if start < stop else ():
                        run = self._part(self.whole.by_name[name], self.moments.get(kind))[: stop - start]
                        run.copy_(read(kind, name, self.whole.slots[name].box, start, stop))
                self.engine.optimizer._reassign_or_swap_out_partitioned_parameters(index)

    def persistent(self) -> dict[str, list[Tensor]]:
        """The tensors that live between steps; float32 weights have a second, master copy in stages 1 to 3.

        What lies on a disk has no tensors.
        """
        parameters = self.whole.by_name.values()
        weights = [parameter.ds_tensor.data if self.stage == 3 else parameter.data for parameter in parameters]  # type: ignore[attr-defined]
        moments = [value for state in self.optimizer.state.values() for key, value in state.items() if key in self.moments.values()]
        kept: dict[str, list[Tensor]] = {"weights": [], "gradients": [], "optimizer": [], "host": []}
        kept["host" if self.mesh.layout.offload == "all" else "weights"] += weights
        kept["host" if self.offload else "optimizer"] += [*(part.data for part in self.parts), *moments]
        return kept
