"""Tokens/s of PPO's collection where completions end together and where their lengths spread 1 to 8, of several trees.

    python tests/benchmarks/collection.py TREE [TREE ...] [--rounds 3] [--slots N]
    python tests/benchmarks/collection.py --smoke                 this checkout alone, a tiny model, one round

Each tree runs in a process of its own; they take turns, so that what else the machine does falls on all of them.  The
lengths are set from outside, the same for every tree, and the completions are compared.
"""

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time

SMOKE = "--smoke" in sys.argv
PROMPTS, WIDTH, NEW, STOP = (8, 32, 16, 2) if SMOKE else (64, 32, 128, 2)
SHAPE = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 48 if SMOKE else 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 2 if SMOKE else 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}


def work(slots: int | None) -> None:
    """Answers each line of the input, "even" or "spread", with an iteration's figures."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxalign.rollout.slots as device
    from jaxalign import config as configuration
    from jaxalign.models.config import from_hf
    from jaxalign.models.transformer import Model
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.parallel.sharding import put_batch
    from jaxalign.rewards.function import FunctionScorer
    from jaxalign.train.experience import initial_extra, make_prepare
    from jaxalign.types import TrainState

    folder = "train" if os.path.exists("tests/train/ppo_world.py") else "ppo"  # as in trees of before
    world = importlib.import_module(f"tests.{folder}.ppo_world")
    drawn = world.drawn
    seen, sample, keys, kind = [], device.sample, device.token_keys, ["even"]

    def token_keys(key, ids, place):
        seen[:] = [ids, place]
        return keys(key, ids, place)

    def ending(logits, keys, **options):
        """The token that was drawn, but for the end, which comes where it is due."""
        token, logprob = sample(logits, keys, **options)
        ids, place = seen
        due = NEW // 8 * (1 + (ids * 5) % 8) if kind[0] == "spread" else NEW
        return jnp.where(place + 1 >= due, STOP, jnp.where(token == STOP, STOP + 1, token)), logprob

    device.token_keys, device.sample = token_keys, ending
    policy, value = (
        Model(from_hf(SHAPE, dtype="float32", param_dtype="float32", remat="none", head=head))
        for head in ("lm", "score")
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, 4096, n).tolist() for n in rng.integers(8, WIDTH + 1, PROMPTS)]
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    params = {"policy": jax.tree.map(jnp.asarray, drawn(policy)), "value": jax.tree.map(jnp.asarray, drawn(value, 1))}
    batch, prepares = put_batch(world.prompt_batch(prompts, WIDTH), mesh), {}
    for name in ("even", "spread"):
        c = configuration.defaults("ppo").unlock()
        c.batch_size, c.rollout.max_new_tokens = PROMPTS, NEW
        if slots is not None:
            c.rollout.num_slots = slots
        options = {"records": world.record, "tokenizer": world.NumberTokenizer(), "stop_ids": (STOP,), "mesh": mesh}
        reward = FunctionScorer(lambda prompts, completions: [float(len(x)) for x in completions])
        prepares[name] = make_prepare(c, policy=policy, value=value, reward=reward, **options)
    extra, zero = initial_extra(c), jnp.int32(0)
    state = TrainState(step=zero, params=params, opt={}, extra=extra, data_cursor=zero)
    for line in sys.stdin:
        if line.strip() != kind[0]:
            kind[0] = line.strip()
            jax.clear_caches()  # the programs hold the lengths of the other kind
        start, begun = time.perf_counter(), time.process_time()
        _, batches, metrics, *_ = jax.block_until_ready(prepares[kind[0]](state, {"ref": params["policy"]}, batch))
        seconds, cpu = time.perf_counter() - start, time.process_time() - begun
        order = np.argsort(np.concatenate([np.asarray(b.batch.record_ids)[:, 0] for b in batches[:1]]))
        target, mask = (
            np.asarray(x)[order] for x in (batches[0].batch.readouts.target, batches[0].batch.readouts.mask)
        )
        said = [t[m].tolist() for t, m in zip(target, mask, strict=True)]
        tokens, decode = sum(map(len, said)), float(metrics["time/decode"])
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        print(json.dumps([tokens, seconds, cpu, decode, digest]), flush=True)


def main() -> None:
    """Lays the trees side by side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trees", nargs="*", default=[os.getcwd()], help="checkouts; default: this one")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--kinds", default="even,spread")
    args = parser.parse_args()
    args.rounds = 1 if args.smoke else args.rounds
    workers = []
    for tree in args.trees:
        command = (
            [sys.executable, os.path.abspath(__file__), "work"]
            + (["--slots", str(args.slots)] if args.slots else [])
            + ["--smoke"] * args.smoke
        )
        environment = os.environ | {"PYTHONPATH": os.path.abspath(tree)}
        workers.append(subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=tree, env=environment))

    def ask(worker, kind):
        worker.stdin.write(f"{kind}\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    for kind in args.kinds.split(","):
        for worker in workers:
            ask(worker, kind)  # compiles
        rounds = [[ask(worker, kind) for worker in workers] for _ in range(args.rounds)]
        for i, tree in enumerate(args.trees):
            found = [r[i] for r in rounds]
            speeds = " ".join(f"{tokens / seconds:.0f}" for tokens, seconds, *_ in found)
            decode = " ".join(f"{tokens / seconds:.0f}" for tokens, _, _, seconds, _ in found)
            cpu = " ".join(f"{seconds:.1f}" for _, _, seconds, *_ in found)
            print(f"{kind:6s} {tree}: {speeds} tokens/s; decoding {decode}; CPU seconds {cpu}; tokens {found[0][4]}")
    for worker in workers:
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    work(int(sys.argv[3]) if sys.argv[2:3] == ["--slots"] else None) if sys.argv[1:2] == ["work"] else main()
