"""Training runs in processes of their own, which tests kill, stop and join together.

Children come from a fork server that has imported everything and touched no device: they start at once.
"""

import json
import multiprocessing
import os
import signal
import tempfile

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["run_child", "preloaded"])

_COMPILED = os.path.join(tempfile.gettempdir(), f"jaxalign-tests-{os.getuid()}", "xla")
DEVICES = 2  # virtual devices of a child


def stories(shared, workdir, algorithm, **fields):
    """A small run on a real model, as plain values: fields by dotted name."""
    data = shared / "data"
    sources = {
        "sft": str(data / "tinystories-sample" / "stories.jsonl"),
        "dpo": str(data / "rasbt-preference" / "instruction-data-with-preference.json"),
        "ppo": str(data / "rasbt-preference" / "instruction-data-with-preference.json"),
        "reward": str(data / "rasbt-preference" / "instruction-data-with-preference.json"),
    }
    fields = {
        "model.path": str(shared / "models" / "stories260k-llama"),
        "workdir": str(workdir),
        "data.sources": (sources[algorithm],),
        "data.max_records": 40,
        "data.max_length": 128,
        "data.truncation": "keep_start",
        "data.cache_dir": str(workdir.parent / "cache"),
        "batch_size": 4,
        "num_train_steps": 8,
        "checkpoint.every": 2,
        "logging.trackers": (),
        "logging.progress": False,
        "optimizer.learning_rate": 1e-4,
        "model.remat": "none",
    } | fields
    if algorithm == "ppo":
        few = {"rollout.max_new_tokens": 8, "algorithm.num_ppo_epochs": 2, "algorithm.num_minibatches": 2}
        reward = {"rewards.function": f"{__file__}:reward", "rewards.normalize": True, "algorithm.kl_target": 0.1}
        fields = few | reward | {"logging.samples_every": 0} | fields
    if algorithm == "dpo":
        fields = {"logging.samples_every": 0, "data.max_prompt_length": 100} | fields
    return {"algorithm": algorithm, "fields": {k.replace("__", "."): v for k, v in fields.items()}}


def reward(prompts, completions):
    """Counts the letter e."""
    return [float(c.count("e")) for c in completions]


def make_config(spec):
    from jaxalign.config import defaults

    config = defaults(spec["algorithm"])
    for name, value in spec["fields"].items():
        *parents, leaf = name.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = tuple(value) if isinstance(value, list) else value
    return config


def child(spec, results, options):
    """Runs a stage; `options` say where it is to die, and which process of how many it is."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={options.get('devices', DEVICES)}")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    import jax

    # Compiled once for all children: they run the same few programs.
    jax.config.update("jax_compilation_cache_dir", _COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_enable_x64", options.get("x64", False))
    os.environ.update(options.get("env", {}))
    if options.get("die_renaming"):
        _die_at_rename(options["die_renaming"])
    if options.get("pace"):
        _pace(options["pace"])
    from jaxalign.errors import InputError
    from jaxalign.train import trainer

    try:
        found = trainer.run(make_config(spec))
    except InputError as error:
        if options.get("expect", "\0") in str(error):
            return
        raise
    finally:
        # A process of several leaves them as jax does when Python ends; these children end without that, and whoever
        # were last would find process 0 gone.
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
    if results:
        with open(results, "w") as file:
            json.dump(found, file)


def start(spec, results=None, **options):
    process = CONTEXT.Process(target=child, args=(spec, results and str(results), options))
    process.start()
    return process


def finish(process, timeout=240):
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("a training process hangs")
    return process.exitcode


def _die_at_rename(step):
    """SIGKILL at the moment when checkpoint `step` is written and about to get its name."""
    from etils.epath import backend

    rename = backend._OsPathBackend.rename

    def dying(self, path, dst):
        if os.path.basename(os.fspath(dst)) == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, path, dst)

    backend._OsPathBackend.rename = dying


def _pace(seconds):
    """Slows each batch down, so that a signal comes in the middle of a run."""
    import time

    from jaxalign.data.dataset import Dataset

    batch = Dataset.batch

    def slow(self, *args):
        time.sleep(seconds)
        return batch(self, *args)

    Dataset.batch = slow
