"""`discrete-lit sample`: a generator's checkpoint to images, clips or text on disk."""

import json
import shutil
import time
from copy import copy
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from tqdm import tqdm

from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.execution import compile_for_sampling
from discrete_lit.checkpoints import load, weights_of
from discrete_lit.cli.audio_samples import spectrograms, write_audio_files
from discrete_lit.cli.checkpoint_choice import chosen_checkpoint
from discrete_lit.cli.devices import make_fabric
from discrete_lit.cli.drawn_rows import DrawnRows
from discrete_lit.cli.known_tokens import KnownTokens
from discrete_lit.cli.video_samples import write_clips
from discrete_lit.core.array_parts import WHOLE, PartsFolder, check_join, find_part, tell_missing, tell_part
from discrete_lit.core.audio import to_int16
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.distributed import all_reduce_sum, on_first_rank
from discrete_lit.core.files import atomic_write, atomic_write_text, file_sha256
from discrete_lit.core.images import ImageSize, displayable, height_and_width, normal_size, to_uint8
from discrete_lit.core.provenance import describe, environment
from discrete_lit.core.random import CounterRandom
from discrete_lit.evaluation.prompts import GENEVAL_FOLDER, Prompts, chosen_prompts, write_geneval
from discrete_lit.generators import (
    CaptionIds,
    Generator,
    GraphedDraw,
    LatentGenerator,
    SegmentGenerator,
    TextVideoAudio,
    TokenDiffusionDecoder,
    Unified,
)
from discrete_lit.generators.graphed_draw import PAYS_FROM
from discrete_lit.generators.token_diffusion_decoder import decoder_from_checkpoint
from discrete_lit.generators.unified import UnifiedOutput
from discrete_lit.pretrained.obtaining import record_of
from discrete_lit.samplers import AnySampler, GuidedSolver
from discrete_lit.tokenizers import ContinuousTokenizer, EnCodec, Tokenizer

_GRID_SIDE = 10
_MOST_COLUMNS = 20
# In pixels, of the default font.
_NARROWEST_TEXT, _LINE_HEIGHT, _MOST_LINES = 200, 13, 4
# Pictures with text are shown at least this high, in whole pixels; the smallest otherwise vanish beside the letters.
_LOWEST_PICTURE = 32


def sample(
    ckpt_path: str | None = None,
    output: str = "",
    *,
    num_samples: int,
    model: str | None = None,
    accept_licence: bool = False,
    labels: list | None = None,  # of int: the parser takes a minute to check the type of each of 20,000
    prompt: list[str] | None = None,
    prompt_file: str | None = None,
    negative_prompt: str | None = None,
    thought: list[str] | None = None,
    sampler: AnySampler | None = None,
    seed: int = 0,
    batch_size: int = 64,
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    precision: str = "32-true",
    compile: bool = False,
    graph: bool | Literal["auto"] = "auto",
    image_size: ImageSize | None = None,
    decoder: str | None = None,
    decoder_sampler: GuidedSolver | None = None,
    decoder_steps: int | None = None,
    known: str | None = None,
    known_positions: list[int] | None = None,
    frame_rate: float = 8.0,
    part: str | None = None,
    join: int | None = None,
    missing: bool = False,
) -> dict[str, Any]:
    """Sample images, clips or text from a generator's checkpoint, which alone is enough.

    Writes `samples.npz` (uint8 `arr_0` of shape (N, H, W, C), int64 `labels`), `grid.png` (of the first images, with a
    column for each of the labels where those are 5 to 20, or else ten columns) and `run.json` with every setting, the
    network calls and operations, and the speed with and without decoding. C is the tokenizer's: 1 of grey images, 4 of
    RGBA; of other numbers than 1, 3 and 4 the grid shows the first channel. Of text, and of a generator that was loaded
    without its tokenizer, the ids are written as `tokens` in place of images, or the latents as `latents`; text itself
    goes to `samples.txt`, a line each. Of clips of frames `arr_0` is (N, T, H, W, C), each row of `grid.png` has the
    frames of one, and `samples.gif` and, with PyAV, `samples.mp4` play them side by side. Of audio `samples.npz` has
    the clips, `audio`, int16 (N, T, C), beside their sample rate; the first are files of `clips/` too, and `grid.png`
    shows spectrograms. Prompts stand in `run.json` and in the grid, and with them the thoughts of a model that writes
    one before it draws. Sample i is a function of (seed, i) alone: the batch size and the number of devices do not
    change it (to the rounding of the network's arithmetic).

    The work can be cut into n jobs of an array: each runs the command with `part: i/n`, in any order, and behind them
    the command with `join: n` writes the files above. A batch is drawn whole by one device, and holds the same samples
    whoever draws it: they are the same bytes for any number of parts, devices and interruptions on one kind of device.
    What was interrupted goes on when it is run again. Of parts `run.json` has the settings of the last, and the speed
    of one job on average.

    Args:
        ckpt_path: checkpoint of a Generator or a LatentGenerator; it carries its tokenizer. Also a folder of
            `save_pretrained`, or `hf://owner/name`, such a folder on the Hugging Face Hub.
        output: folder to write, which must be given; its earlier samples are replaced.
        num_samples: N.
        model: name of a published model, in place of `ckpt_path`: `discrete-lit models` lists them. Its files are
            downloaded, checked and converted where they are not in the cache.
        accept_licence: that you accept the licence of `model`, where `discrete-lit models NAME` says that you must.
        labels: classes to cycle through, sample i has labels[i % len(labels)]; every class in turn by default, so that
            each prefix is balanced. `num_classes` stands for no class.
        prompt: texts to cycle through in the same way, for a generator that reads texts; repeat the option for
            several. Each begins a row of the grid, and "" stands for no text.
        prompt_file: a file with a prompt on each line, in place of `prompt`. Of a `.jsonl` of GenEval's objects, its
            `evaluation_metadata.jsonl`, the images are written in `output/geneval` too, as its evaluator reads them.
        negative_prompt: what guidance leads away from, in place of no text.
        thought: what a `Unified` with thoughts is to think in place of its own: one for all prompts, or the option
            repeated, one for each.
        sampler: how to draw; the generator's own by default. A `SegmentSampler` draws from a `Unified`, a
            `GuidedSolver` whole latents, a
            `MARSampler` those of a `ContinuousMasked`, a `NextCellSampler` of a `NextCell`, a `DimensionwiseSampler`
            of a `DimensionwiseMasked`, and a `HybridScaleSampler` those of HART and of scales of vectors.
        seed: of the draw.
        batch_size: images at a time on each device.
        accelerator: Lightning's; `auto` takes a GPU where there is one.
        devices: on each node; more than one starts a process for each.
        num_nodes: nodes that run this command.
        precision: Lightning's: `32-true`; `bf16-mixed` or `16-mixed`, by autocast; `bf16-true`, `16-true` or `64-true`,
            which convert the weights of generator and tokenizer; or `auto`, bfloat16 by autocast where the device
            multiplies it and float32 elsewhere.
        compile: compile the blocks of the backbone first, which takes a minute: for many samples.
        graph: replay a whole draw as one CUDA graph for each batch, compiled or not, so that a GPU does not wait for
            the host; the samples are the same. `auto` does from the third full batch of a process on, see
            `GraphedDraw`.
        image_size: of the written images in pixels, H = W or `[H, W]`, as published evaluations shrink samples of 384
            to 256; the decoded ones are resized before they are rounded (bicubic without anti-aliasing, LlamaGen's).
            The tokenizer's own size by default.
        decoder: checkpoint of a `TokenDiffusionDecoder`, which decodes in place of the generator's tokenizer. It must
            be made for the same tokens: grid, vocabulary, and hash of the tokenizer's weights.
        decoder_sampler: how the decoder draws; its own by default.
        decoder_steps: steps of the decoder's own sampler, in place of those that it was trained with.
        known: a folder of token arrays, as `tokenize` writes it, by the generator's tokenizer: sample i keeps tokens of
            its row i, and the others are drawn. So clips are continued and pictures completed. The labels are those of
            the rows unless others are given.
        known_positions: which tokens are kept, by their positions along the first axis of a sample's: frames of a clip,
            rows of a picture. `[0, 1]` continues the first two frames of tokens; a generator in raster order keeps the
            first ones alone, a masked one any.
        frame_rate: frames a second of the files that play.
        part: `i/n`, to draw the i-th of n parts, i from 1; `slurm` for the number of this job in its SLURM array.
        join: n, to write the samples when n parts are done.
        missing: draw nothing, and print the numbers of the parts that are left, as an array of sbatch takes them; the
            exit status is 1 if there are any.

    Returns:
        What `run.json` holds; nothing for a part; `{"missing": [...]}` where that is asked for.

    Raises:
        ValueError: neither or both of ckpt_path and model, or no output; a model that the list lacks, that cannot be
            downloaded, or whose licence is not accepted; not a generator's checkpoint; prompts for a generator without
            text, none for one that reads them, or a num_samples that does not have as many of each of GenEval's; a
            sampler of ids for latents or the other way round; a label that is no number or out of range, num_samples or
            image_size below 1, an image size for text, a graph on another device than CUDA's or of latents, a decoder
            of other tokens than the generator's, known tokens that are not there, of another tokenizer, or not for this
            generator, a part with other settings than those that have begun, or parts to join that are not there or
            were damaged.
    """
    if not output:
        raise ValueError("output is not given: it is the folder to write")
    if missing:
        return tell_missing(output, "sample", "samples.npz")
    check_join(part, join)
    own_part, parts = find_part(part, output, "sample"), PartsFolder(output, "sample")
    ckpt_path = chosen_checkpoint(ckpt_path, model, accept_licence=accept_licence)
    generator = load(ckpt_path)
    if not isinstance(generator, Generator | LatentGenerator | SegmentGenerator):
        raise ValueError(f"ckpt_path={ckpt_path!r} holds a {type(generator).__name__}, not a Generator")
    if isinstance(generator, TokenDiffusionDecoder):
        raise ValueError(
            f"ckpt_path={ckpt_path!r} holds a TokenDiffusionDecoder, which decodes tokens and draws none: give it as "
            "decoder, and the generator of its tokens as ckpt_path"
        )
    if decoder is None and not (decoder_sampler is None and decoder_steps is None):
        raise ValueError("decoder_sampler and decoder_steps are of a decoder: give decoder too")
    decoding = None
    if decoder is not None:
        decoding = _load_decoder(decoder, generator, decoder_sampler, decoder_steps)
    makes_audio, makes_clips = isinstance(generator.tokenizer, EnCodec), generator.tokenizer.modality == "video"
    makes_images = (decoding is not None and not makes_audio) or generator.tokenizer.makes_images or makes_clips
    if sampler is not None and not isinstance(sampler, generator.sampler_kind):
        raise ValueError(
            f"sampler={type(sampler).__name__} does not draw from a {type(generator).__name__}, which needs a "
            f"{generator.sampler_kind.__name__}"
        )
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}")
    if image_size is not None:
        image_size = normal_size(image_size)
    if (known is None) != (known_positions is None):
        raise ValueError("known, a folder of tokens, and known_positions, those that are kept, are given together")
    if known is not None and isinstance(generator, TextVideoAudio):
        raise ValueError("known tokens are for generators of ids alone; `TextVideoAudio.sample` takes first_frames")
    if known is not None and (prompt or prompt_file or graph is True):
        raise ValueError("known tokens are for samples without prompts, and are drawn without a graph")
    if image_size is not None and (makes_clips or not makes_images):
        raise ValueError(f"image_size={image_size} is given, but this generator's tokenizer makes no images")
    readers = [each for each in (generator, decoding) if each is not None and each.reads_text]
    prompts = chosen_prompts(readers[0] if readers else generator, prompt, prompt_file, negative_prompt)
    if prompts is not None and prompts.metadata is not None:
        prompts.check_count(num_samples, "num_samples")
        if not makes_images:
            raise ValueError(f"prompt_file={prompt_file!r} has GenEval's objects, and this generator makes no images")
    thoughts = _thoughts(generator, thought, prompts)
    fingerprint = generator.tokenizer.fingerprint()  # of the weights as they were saved
    kept = None
    if known is not None and known_positions is not None:
        kept = KnownTokens(known, known_positions, generator=generator, fingerprint=fingerprint)
    given = list(range(generator.num_classes)) if labels is None else labels
    if kept is not None and labels is None:
        given = kept.labels
    wrong = [label for label in given if type(label) is not int or not 0 <= label <= generator.num_classes]
    if wrong or not given:
        raise ValueError(
            f"labels holds {repr(wrong[0]) if wrong else 'nothing'}, accepted: int in [0, {generator.num_classes}]; "
            f"{generator.num_classes} stands for no class"
        )
    cycle = torch.tensor(given)
    drawer = cast(Any, sampler or generator.sampler)
    _check_room(output, num_samples)
    if prompts and graph is True:
        raise ValueError("graph=true is for labels; texts are drawn without one")
    if prompts:  # refuses a text that is too long before anything is drawn
        texts = [*prompts.texts, negative_prompt or ""]
        own = None if thoughts is None else [*thoughts, ""]
        for reader in readers:
            _condition(reader, torch.zeros(len(texts), dtype=torch.int64), texts, thoughts=own)
        scales = [drawer.guidance_scale if reader is generator else reader.sampler.guidance_scale for reader in readers]
        if negative_prompt is not None and all(scale == 1 for scale in scales):
            raise ValueError("negative_prompt is of guidance: give the sampler a guidance_scale above 1")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    starts = _starts_of_run(folder / "run.json")

    precision = resolve_precision(precision, accelerator)
    fabric = make_fabric(accelerator, devices=devices, num_nodes=num_nodes, precision=precision)
    fabric.launch()
    fabric.strategy.precision.convert_module(generator)  # in place
    generator = generator.to(fabric.device)
    if decoding is not None:
        fabric.strategy.precision.convert_module(decoding)
        decoding = decoding.to(fabric.device)
    if compile:
        compile_for_sampling(generator.backbone)
    settings = {
        "checkpoint": str(ckpt_path),
        "checkpoint_sha256": file_sha256(weights_of(ckpt_path)),
        "model": record_of(ckpt_path),
        "generator": type(generator).__name__,
        "tokenizer_fingerprint": fingerprint,
        "sampler": describe(drawer),
        "num_samples": num_samples,
        "labels": labels,
        "known": known,
        "known_positions": known_positions,
        "prompts": None if prompts is None else list(prompts.texts),
        "negative_prompt": negative_prompt,
        "given_thoughts": thought,
        "thoughts": None,
        "num_classes": generator.num_classes,
        "seed": seed,
        "batch_size": batch_size,
        "precision": precision,
        "weights_dtype": _dtype_of(generator.backbone),
        "compile": compile,
        "image_size": image_size,
        "decoder": None
        if decoding is None
        else {"checkpoint": str(decoder), "sha256": file_sha256(str(decoder)), "sampler": describe(decoding.sampler)},
    }
    this = own_part or WHOLE
    batches = this.batches(num_samples, batch_size)
    drawn_rows = DrawnRows(folder, parts, count=num_samples, batch_size=batch_size)

    def publish(run: dict[str, Any]) -> dict[str, Any]:
        if isinstance(generator, Unified) and drawn_rows.has_thoughts:
            run["thoughts"] = generator.text.decode(torch.from_numpy(np.load(drawn_rows.thoughts_path)))
        rows = np.load(drawn_rows.path, mmap_mode="c")
        labels_of_rows = np.resize(cycle.numpy(), num_samples)
        own_tokenizer = None if decoding and not makes_audio else generator.tokenizer
        _write(folder, own_tokenizer, rows, labels_of_rows, run, frame_rate=frame_rate)
        if prompts is not None and prompts.metadata is not None:
            write_geneval(folder / GENEVAL_FOLDER, np.load(drawn_rows.path, mmap_mode="r"), prompts)
        drawn_rows.clear()
        return run

    same = {**settings, "torch": torch.__version__}
    if join is not None:
        return on_first_rank(lambda: publish({**drawn_rows.joined(join, same), **starts}))
    on_first_rank(lambda: parts.begin(this, same, drawn_rows.clear))
    if own_part is not None and on_first_rank(lambda: parts.facts(this)) is not None:
        return tell_part(own_part, output)
    left = on_first_rank(lambda: drawn_rows.unfinished(batches))
    own = [int(batch) * batch_size for batch in left[fabric.global_rank :: fabric.world_size]]
    graphed = None
    if isinstance(generator, LatentGenerator):
        if graph is True:
            raise ValueError("graph=true is for generators of ids; latents are drawn without one")
    elif (
        isinstance(generator, Generator)
        and not prompts
        and kept is None
        and _graph_pays(graph, fabric.device, full_batches=sum(start + batch_size <= num_samples for start in own))
    ):
        graphed = GraphedDraw(generator, drawer, seed=seed, batch_size=batch_size)
    count, drawn = 0, None
    seconds = seconds_undecoded = 0.0
    for start in tqdm(own, desc="sample", unit="batch", disable=fabric.global_rank > 0):
        indices = torch.arange(start, min(start + batch_size, num_samples))
        begin = time.perf_counter()
        with torch.inference_mode(), fabric.autocast():
            batch = cycle[indices % len(cycle)].to(fabric.device), indices.to(fabric.device)
            if graphed is None:
                texts = [] if prompts is None else prompts.of(indices.tolist())
                told = None if thoughts is None else [thoughts[index % len(thoughts)] for index in indices.tolist()]
                condition: Any = _condition(generator, batch[0], texts, negative=negative_prompt, thoughts=told)
                keeps: dict[str, Any] = {} if kept is None else {"known": kept.of(batch[1])}
                drawn = generator.draw(condition, CounterRandom(seed, batch[1]), drawer, **keeps)
            else:
                drawn = graphed(*batch)
            _wait_for(fabric.device)
            seconds_undecoded += time.perf_counter() - begin
            if decoding is None:
                decodes = makes_images or makes_audio
                decoded = generator.tokenizer.decode(drawn.tokens) if decodes else drawn.tokens
            else:
                texts = [] if prompts is None else prompts.of(indices.tolist())
                decoded_given: Any = batch[0] if decoding.num_classes > 1 else None
                if decoding.reads_text:
                    decoded_given = _condition(decoding, batch[0], texts, negative=negative_prompt)
                decoded = decoding.decode(drawn.tokens, decoded_given, seed=seed, indices=batch[1])
            if makes_audio:
                rows = to_int16(decoded).movedim(1, -1).cpu().numpy()
            else:
                rows = _rows(decoded, image_size) if makes_images else decoded.cpu().numpy()
        seconds += time.perf_counter() - begin
        thought_rows = None
        if isinstance(generator, Unified) and generator.thought_length is not None:
            own_thoughts = cast(UnifiedOutput, drawn).thoughts
            assert own_thoughts is not None, "a model with thoughts draws behind one"
            thought_rows = generator.thought_rows(own_thoughts).cpu().numpy()
        drawn_rows.write(indices.numpy(), rows, thought_rows)
        count += len(indices)
    drawn_rows.close()
    fabric.barrier()

    rates = torch.tensor((count / seconds, count / seconds_undecoded) if count else (0.0, 0.0), device=fabric.device)
    rate, rate_undecoded = all_reduce_sum(rates).tolist()
    run = {
        **settings,
        "world_size": fabric.world_size,
        "graph": graphed is not None and graphed.recorded,
        "parameters": sum(
            parameter.numel() for network in generator.drawing_networks() for parameter in network.parameters()
        ),
        "network_calls": drawn.network_calls if drawn else 0,
        "sequential_passes": drawn.sequential_passes if drawn else 0,
        "flops_per_image": drawn.flops if drawn else 0,
        "images_per_second": rate,
        "images_per_second_without_decoding": rate_undecoded,
        **environment(fabric.device),
    }
    if own_part is not None:
        on_first_rank(lambda: drawn_rows.finish(own_part, run))
        return tell_part(own_part, output)
    return on_first_rank(lambda: publish({**run, **starts}))


def _check_room(output: str, num_samples: int) -> None:
    """Refuse more samples than the disk has bytes, before anything is drawn; how large one is says the first batch."""
    there = next(folder for folder in (Path(output), *Path(output).absolute().parents) if folder.exists())
    if num_samples > (free := shutil.disk_usage(there).free):
        raise ValueError(f"num_samples is {num_samples:,}, and {there} has {free:,} bytes of free space")


def _thoughts(
    generator: Generator | LatentGenerator | SegmentGenerator, given: list[str] | None, prompts: Prompts | None
) -> list[str] | None:
    """The thought of each prompt, where thoughts are given.

    Raises:
        ValueError: thoughts for a generator without, or another number of them than of prompts.
    """
    if given is None:
        return None
    if not isinstance(generator, Unified) or generator.thought_length is None:
        raise ValueError(
            f"thought is given, and this {type(generator).__name__} has none: a Unified has thoughts that was trained "
            "with a thought_length"
        )
    texts = () if prompts is None else prompts.texts
    if len(given) not in (1, len(texts)):
        raise ValueError(
            f"thought is given {len(given)} times for {len(texts)} prompts: give one for all, or one for each"
        )
    return given if len(given) == len(texts) else given * len(texts)


def _condition(
    generator: Generator | LatentGenerator | SegmentGenerator,
    labels: torch.Tensor,
    texts: list[str],
    *,
    negative: str | None = None,
    thoughts: list[str] | None = None,
) -> Condition | CaptionIds | torch.Tensor:
    """The condition of a batch: its labels, or these and its texts."""
    if not texts or not generator.reads_text:
        return labels
    away = None if negative is None else [negative] * len(texts)
    if isinstance(generator, Unified):
        return generator.condition_of_texts(texts, negative=away, thoughts=thoughts)
    classes = labels if generator.num_classes > 1 else None
    return generator.condition_of_texts(texts, labels=classes, negative=away)


def _dtype_of(network: torch.nn.Module) -> str:
    """The precision of a network's weights, as `bfloat16`."""
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def _graph_pays(graph: bool | Literal["auto"], device: torch.device, *, full_batches: int) -> bool:
    """Whether the draws of a process are recorded as a CUDA graph.

    To record one starts every operation once more, which takes as long as a draw whose operations are small; where
    they are large it saves nothing, and costs as little. So it pays from the first draw on that is only replayed.
    """
    if graph is True and device.type != "cuda":
        raise ValueError(f"graph=true replays CUDA graphs, which a {device.type} has not: use a GPU, or graph=auto")
    return graph is True or (graph == "auto" and device.type == "cuda" and full_batches >= PAYS_FROM)


def _wait_for(device: torch.device) -> None:
    """Until the device has done what it was given, so that its time is not counted to what follows."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _load_decoder(
    path: str,
    generator: Generator | LatentGenerator | SegmentGenerator,
    sampler: GuidedSolver | None,
    steps: int | None,
) -> TokenDiffusionDecoder:
    """The decoder of a checkpoint, checked against the generator, with the sampler that was asked for.

    Raises:
        ValueError: another kind of checkpoint, a generator of latents, a decoder of other tokens, a sampler that does
            not fit its path, or steps beside a sampler.
    """
    if not isinstance(generator, Generator):
        raise ValueError(f"decoder is for generators of ids, and this one is a {type(generator).__name__}")
    if sampler is not None and steps is not None:
        raise ValueError(f"decoder_steps={steps} is of the decoder's own sampler: give it or decoder_sampler")
    decoder = decoder_from_checkpoint(path)
    try:
        decoder.check_source(generator.tokenizer, generator.image_size, num_classes=generator.num_classes)
    except ValueError as error:
        raise ValueError(f"decoder={path!r} does not fit this {type(generator).__name__}: {error}") from error
    if sampler is None and steps is not None:
        sampler = copy(cast(GuidedSolver, decoder.sampler))
        sampler.solver = sampler.solver.with_steps(steps)
    if sampler is not None:
        sampler.solver.times(decoder.denoiser.path)  # refuses what the path does not have
        decoder.check_draw(torch.zeros(1, dtype=torch.int64), sampler.guidance_scale)
        decoder.sampler = sampler
    return decoder


def _rows(decoded: torch.Tensor, image_size: ImageSize | None) -> np.ndarray:
    """Images `(B, H, W, C)` uint8 of decoded ones `(B, C, H, W)`; the copy waits for the device."""
    if image_size is not None:
        decoded = F.interpolate(decoded.float(), size=height_and_width(image_size), mode="bicubic")
    return to_uint8(decoded).movedim(1, -1).cpu().numpy()


def _write(
    folder: Path,
    tokenizer: Tokenizer | ContinuousTokenizer | None,
    rows: np.ndarray,
    labels: np.ndarray,
    run: dict[str, Any],
    *,
    frame_rate: float,
) -> None:
    """samples.npz, grid.png or samples.txt, and run.json, each complete or absent; of images no tokenizer is needed."""
    makes_clips = tokenizer is not None and tokenizer.modality == "video"
    makes_images = tokenizer is None or tokenizer.makes_images or makes_clips
    with atomic_write(folder / "samples.npz") as file:
        if makes_images:
            np.savez(file, arr_0=rows, labels=labels)
        elif isinstance(tokenizer, EnCodec):
            np.savez(file, audio=rows, labels=labels, sample_rate=tokenizer.sample_rate)
        elif isinstance(tokenizer, Tokenizer):
            np.savez(file, tokens=rows, labels=labels)
        else:
            np.savez(file, latents=rows, labels=labels)
    if makes_clips:
        write_clips(folder, rows, columns=len(run["labels"] or range(run["num_classes"])), frame_rate=frame_rate)
    elif makes_images and run["prompts"]:
        _write_prompt_grid(folder, rows, run["prompts"], thoughts=run["thoughts"])
    elif makes_images:
        _write_grid(folder, rows, cycle=len(run["labels"] or range(run["num_classes"])))
    elif isinstance(tokenizer, EnCodec):
        write_audio_files(folder, rows, sample_rate=tokenizer.sample_rate)
        _write_grid(folder, spectrograms(rows[:_GRID_SIDE]), cycle=1)
    elif isinstance(tokenizer, Tokenizer):
        texts = tokenizer.texts(torch.from_numpy(np.asarray(rows)))
        if texts is not None:
            atomic_write_text(folder / "samples.txt", "".join(f"{text}\n" for text in texts))
    atomic_write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")


def _starts_of_run(file: Path) -> dict[str, Any]:
    """Read what a record has of the starts of a run, whose folder the samples go to; nothing where there is none.

    Raises:
        ValueError: it cannot be read, and would be lost.
    """
    earlier = read_json(file) if file.is_file() else {}
    if not isinstance(earlier, dict):
        raise ValueError(f"{file} holds a {type(earlier).__name__}: it is no record of ours, and would be overwritten")
    return {"starts": earlier["starts"]} if "starts" in earlier else {}


def _write_grid(folder: Path, pixels: np.ndarray, *, cycle: int = _GRID_SIDE) -> None:
    """Write the first images in ten rows at most, with a column for each of `cycle` labels where that is a width."""
    columns = cycle if _GRID_SIDE // 2 <= cycle <= _MOST_COLUMNS else _GRID_SIDE
    side = min(columns, len(pixels))
    tiles = pixels[: side * min(_GRID_SIDE, len(pixels) // side)]
    with atomic_write(folder / "grid.png") as file:
        Image.fromarray(_tiled(tiles, side)).save(file, "PNG")


def _tiled(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Put images `(n, H, W, C)` beside one another, row after row, in a form that a PNG has."""
    shown = displayable(torch.from_numpy(np.array(tiles)).movedim(-1, 1)).movedim(1, -1).numpy()
    rows = shown.reshape(-1, columns, *shown.shape[1:])  # (rows, columns, H, W, C)
    grid = rows.swapaxes(1, 2).reshape(rows.shape[0] * rows.shape[2], -1, shown.shape[-1])
    return grid[..., 0] if grid.shape[-1] == 1 else grid


def _write_prompt_grid(
    folder: Path, pixels: np.ndarray, prompts: list[str], *, thoughts: list[str] | None = None
) -> None:
    """Write the first images of the first prompts, at most ten of ten, a row for each, with its text above.

    Behind a prompt stand the thoughts of its images, from left to right, or the one that they share.
    """
    rows = min(_GRID_SIDE, len(prompts), len(pixels))
    columns = min(_GRID_SIDE, len(pixels) // len(prompts) or 1)
    font = ImageFont.load_default()
    times = -(-_LOWEST_PICTURE // pixels.shape[1])
    strips = []
    for row in range(rows):
        shown = pixels[row :: len(prompts)][:columns].repeat(times, axis=1).repeat(times, axis=2)
        pictures = Image.fromarray(_tiled(shown, columns)).convert("RGB")
        text = prompts[row] or "(no text)"
        if thoughts is not None:
            own = thoughts[row :: len(prompts)][:columns]
            text += f" : {' | '.join(own if len(set(own)) > 1 else own[:1])}"
        lines = _wrapped(text, font, max(pictures.width, _NARROWEST_TEXT) - 4)
        height = _LINE_HEIGHT * len(lines) + 4
        strip = Image.new("RGB", (max(pictures.width, _NARROWEST_TEXT), height + pictures.height), "white")
        ImageDraw.Draw(strip).multiline_text((2, 2), "\n".join(lines), fill="black", font=font, spacing=0)
        strip.paste(pictures, (0, height))
        strips.append(strip)
    grid = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        grid.paste(strip, (0, top))
        top += strip.height
    with atomic_write(folder / "grid.png") as file:
        grid.save(file, "PNG")


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Break a text into lines of at most so many pixels; characters that the font lacks are shown as boxes."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:_MOST_LINES]
