"""The ways to start on several ranks that ship: each file is read by the tool it is for, as far as that goes here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType

from tests.commands.test_train import checkpoint, manifest, records, write_data, write_recipe  # noqa: F401
from tests.paths import REPO
from vlmpo.commands.config import training_config
from vlmpo.recipe_yaml import load_recipe

RECIPES = REPO / "recipes"
SCRIPTS = sorted((RECIPES / "launch").iterdir())
CONFIGS = sorted((RECIPES / "accelerate").glob("*.yaml"))
NAMED = re.compile(r"recipes/[\w/]+\.\w+")
SETTINGS = {"MASTER_ADDR": "node0", "NODES": "4", "RANK_OF_NODE": "1", "SLURM_JOB_NODELIST": "node[0-3]"}
SETTINGS |= {"SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "GPUS": "8"}


@pytest.mark.parametrize("file", [*SCRIPTS, *CONFIGS], ids=lambda file: file.name)
def test_every_file_it_names_exists(file: Path) -> None:
    named = set(NAMED.findall(file.read_text()))
    assert named or file in CONFIGS
    assert [name for name in named if not (REPO / name).is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_what_a_script_would_run(tmp_path: Path, script: Path) -> None:
    """The launchers are replaced by ``echo``: the command says which recipe is trained, with the user's overrides."""
    for name in ("torchrun", "accelerate", "srun"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node0\\nnode1\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    environment = {**os.environ, **SETTINGS, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    arguments = ["my.yaml", "loss.beta=0.2", "training.seed=3"]
    done = subprocess.run([script, *arguments], cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("-m vlmpo train my.yaml loss.beta=0.2 training.seed=3")
    default = subprocess.run([script], cwd=REPO, env=environment, capture_output=True, text=True, check=True).stdout
    recipe = default.rstrip().rpartition(" ")[2]
    assert training_config(load_recipe(REPO / recipe, ["training.bf16=false", "training.fsdp=null"])).beta == 0.1
    if "nodes" in script.name or "slurm" in script.name:
        assert re.search(r"--(nnodes|num_machines) 4 ", done.stdout)
        meeting = r"(--rdzv-endpoint node0:29500|--main_process_ip node0 --main_process_port 29500) "
        assert re.search(meeting, done.stdout)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_accelerate_reads_the_configs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    config: Any = load_config_from_file(str(file))
    assert config.num_processes == -1  # not said: whoever launches says it
    given = ["--config_file", str(file), "--num_processes", "3", "-m", "vlmpo"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert args.num_processes == 3
    if file.stem == "deepspeed_zero3":
        args.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(args)
        assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "recipes/deepspeed/zero3.json"
        return
    assert config.mixed_precision == "bf16"
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert ("ACCELERATE_USE_FSDP" in environment) == (file.stem == "fsdp2")
    if file.stem != "fsdp2":
        return
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is True
    assert plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT


def test_the_fsdp_recipe_asks_for_fsdp2() -> None:
    args = training_config(load_recipe(RECIPES / "internvl3_38b.yaml", ["training.bf16=false"]))
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    assert plugin.fsdp_version == 2
    assert plugin.activation_checkpointing is True
    assert plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT
    assert args.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 32 == 512


@pytest.mark.slow
def test_accelerate_launch_trains(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    """Two processes, from the config that ships, by the script that ships; no key says that they are on the CPU."""
    write_data(tmp_path, records(5))
    recipe = write_recipe(tmp_path, checkpoint, training={"use_cpu": False})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    config = (RECIPES / "accelerate" / "ddp.yaml").read_text()
    (tmp_path / "cpu.yaml").write_text(config.replace("precision: bf16", "precision: 'no'"))
    environment |= {"CONFIG": str(tmp_path / "cpu.yaml"), "GPUS": "2"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [RECIPES / "launch" / "accelerate.sh", recipe], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = manifest(tmp_path)
    assert found["status"] == "finished"
    assert found["world_size"] == 2
    assert found["data"]["sets"]["noise"]["used"] == 5
