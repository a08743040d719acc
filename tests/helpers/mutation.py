"""Inputs for readers of files: valid ones, changed at random places; each is a function of its reader and a number."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache

import torch
from PIL import Image
from safetensors.torch import save

from .broken_images import encoded, noise

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
# What readers of texts stumble over: ends of lines, halves of characters, depths, lengths, numbers, links to others.
_WORDS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\xc2\x85", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xf5",
    b"{" * 3000, b"[" * 3000, b"9" * 5000, b"1e999", b"-1e999", b"NaN", b"Infinity", b"-0", b"0x10", b"1_0", b"null",
    b"true", b'"', b"'", b'"""', b"\\ud800", b"\\u0000", b"\\", b"{}", b"[]", b"{a|b|{c|d}}", b"a." * 200, b"&a [*a]",
    b"*a", b"!!python/object/apply:os.system [x]", b"<<: *a", b"#", b"=", b":", b",", b"[[x]]", b"[x]", b"../../x",
    b"1979-05-27T07:32:00Z", b"\x1b[2J", b"\xe2\x80\xae", b"-1", b"18446744073709551616", b"1.5", b"x" * 3000,
]  # fmt: skip
_SIZES = [0, 1, 2, 127, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def mutated(rng: random.Random, content: bytes, words: Sequence[bytes] = (), *, most: int = 4) -> bytes:
    """A content with one change or a few, or with none."""
    found = bytearray(content)
    for _ in range(rng.randrange(most + 1)):
        at = rng.randrange(len(found) + 1)
        size = rng.choice([1, 1, 2, 4, 8, 64, len(found) // 2])
        match rng.randrange(8):
            case 0:
                found[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                found[at : at + size] = b""
            case 2:
                found[at:at] = found[at : at + size]
            case 3:
                found[at:at] = rng.randbytes(size if size < 64 else 64)
            case 4:
                del found[at:]
            case 5:
                width = rng.choice([1, 2, 4, 8])
                number = rng.choice(_SIZES) % 256**width
                found[at : at + width] = number.to_bytes(width, rng.choice(["little", "big"]))
            case 6 if words:
                found[at:at] = rng.choice(words)
            case _:
                other = rng.randrange(len(found) + 1)
                found[at : at + size] = found[other : other + size]
    return bytes(found)


# --- Texts ------------------------------------------------------------------------------------------------------------


def text(rng: random.Random) -> bytes:
    """A caption, as text or as JSON."""
    seeds = [
        "zumi, a red ball, {on grass|by the sea}, from above ||| masterpiece",
        "ein Bär\nüber dem Fluß\r\n",
        '{"caption": "a ball", "tags": ["red", "round"]}',
        '{"text": ["a ball", "a red ball"], "tags": "red, round"}',
    ]
    content = rng.choice(seeds).encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-16", "cp1252", "utf-8-sig"]))
    return mutated(rng, content, _WORDS)


def jsonl(rng: random.Random) -> bytes:
    """A `metadata.jsonl`."""
    odd = ["a ball", "", 1, None, [], {}, "\ud800", "x" * 1000, 1e308, True]
    names = ["a.png", "b.png", "../a.png", "", "a.png\n", 3, None]
    lines = [
        json.dumps({rng.choice(["file_name", "file_name", "file"]): rng.choice(names[: rng.choice([2, 7])]),
                    "text": rng.choice(odd[: rng.choice([1, 10])])})
        for _ in range(rng.randrange(6))
    ]  # fmt: skip
    return mutated(rng, "\n".join(lines).encode("utf-8", "surrogatepass"), _WORDS)


def settings(rng: random.Random) -> bytes:
    """A configuration of ours, a list of jobs, or another trainer's file."""
    seeds = [
        'extends = "quickstart"\nname = "hero"\n[data]\nfolder = "images"\ntrigger = "zumi"\n[train]\nepochs = 3\n',
        '[base]\npath = "x"\n[lora]\nrank = 8\nalpha = 4.0\ntargets = ["conv"]\n[[data.sets]]\nfolder = "x"\n',
        '[preview]\nprompts = ["a cat --n blurry --w 832 --d 7", { text = "x", seeds = [1] }]\n[data]\nfolder = "x"',
        '[defaults]\nconfig = "quickstart"\n[[jobs]]\nname = "a"\nset = { "lora.rank" = 4 }\n[sweep]\nseed = [1, 2]\n',
        'pretrained_model_name_or_path = "x"\nnetwork_module = "networks.lora"\nnetwork_dim = 8\ntrain_data_dir = "y"',
        '[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "x"\n',
        '{"LoRA_type": "Standard", "max_resolution": "512,512", "epoch": 3, "train_data_dir": "x", "network_dim": 8}',
        '{"training_method": "LORA", "base_model_name": "x", "concepts": [{"path": "x"}], "learning_rate": 1e-4}',
        "job: extension\nconfig:\n  name: x\n  process:\n  - type: sd_trainer\n    network: {type: lora, linear: 16}\n"
        "    datasets: [{folder_path: x, resolution: [512, 768]}]\n    model: {name_or_path: x}\n",
        "accelerate launch train_dreambooth_lora.py --rank=8 --instance_data_dir='x' --max_train_steps 100\n",
    ]
    return mutated(rng, rng.choice(seeds).encode(), _WORDS)


# --- Files of tensors -------------------------------------------------------------------------------------------------


@cache
def _loras() -> list[bytes]:
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    kohya = {f"{MODULE}.lora_down.weight": down, f"{MODULE}.lora_up.weight": up}
    dora = {f"{MODULE}.dora_scale": torch.ones(8, 1), f"{MODULE}.alpha": torch.tensor(2)}
    peft = {f"{PEFT}.lora_A.weight": down, f"{PEFT}.lora_B.weight": up}
    adapter = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"attn2.to_k": 8}})
    trained = {"ss_network_dim": "2", "sdlora.settings": '{"lora": {"timestep_rank_min": 1}}', "ss_tag_frequency": "{}"}
    ldm = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 1, 1),
        "model.diffusion_model.input_blocks.1.0.out_layers.3.weight": torch.ones(2, 2, 1, 1),
        "model.diffusion_model.output_blocks.0.0.out_layers.3.weight": torch.ones(2, 2, 1, 1),
        "first_stage_model.encoder.down.0.block.0.conv1.weight": torch.ones(2, 2, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(4, 8),
    }
    return [
        save(kohya | {f"{MODULE}.alpha": torch.tensor(2.0)}, trained),
        save({key: tensor.half() for key, tensor in (kohya | dora).items()}, trained),
        save(peft, {"lora_adapter_metadata": adapter}),
        save({f"transformer.layers.0.attention.to_q.lora_{x}.weight": t for x, t in (("A", down), ("B", up))}),
        save(ldm),
    ]


def safetensors(rng: random.Random) -> bytes:
    """A LoRA or a checkpoint: bytes changed anywhere, or a changed header of the right length."""
    content = rng.choice(_loras())
    if rng.random() < 0.3:
        return mutated(rng, content)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    for _ in range(rng.randrange(3)):
        _change(rng, header)
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        raw = mutated(rng, raw, _WORDS)
    return struct.pack("<Q", len(raw)) + raw + content[end:]


def _change(rng: random.Random, header: dict[str, object]) -> None:
    deep = "[" * rng.choice([10, 200_000])
    odd = [None, 1, -1, 2**64, 10**400, 1e308, "", "x", deep, [], {}, [-1], [2**63, 2**63], [[1]], True, "F64", "I64"]
    key = rng.choice([*header, rng.choice(["__metadata__", "", "x", f"{MODULE}.x", "unet.x.lora_A.weight"])])
    value = header.get(key)
    if isinstance(value, dict) and value and rng.random() < 0.8:
        inner = rng.choice(list(value))
        settings = [json.dumps({"unet.lora_alpha": odd_}) for odd_ in (10**400, -1, 0, "x", None, [1])]
        settings += ['{"unet.lora_alpha": Infinity}', '{"unet.lora_alpha": NaN}', "[", deep, "{}", "[]", "9" * 5000]
        value[inner] = rng.choice(settings if inner == "lora_adapter_metadata" else odd)
    elif rng.random() < 0.3:
        header.pop(key, None)
    else:
        header[key] = rng.choice([*odd, value])


# --- Zips and images --------------------------------------------------------------------------------------------------


@cache
def _images() -> dict[str, bytes]:
    small = noise((12, 10))
    palette = small.quantize(8)
    palette.info["transparency"] = 3
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "a.png": encoded("PNG", small, exif=exif),
        "b.png": encoded("PNG", palette),
        "c.png": encoded("PNG", Image.new("I;16", (6, 5), 40_000)),
        "a.jpg": encoded("JPEG", small, exif=exif),
        "a.webp": encoded("WEBP", small, lossless=True),
        "b.webp": encoded("WEBP", noise((12, 10), 4)),
        "a.bmp": encoded("BMP", small),
        "a.tif": encoded("TIFF", small, compression="tiff_lzw"),
        "a.avif": encoded("AVIF", small),
    }  # fmt: skip


def image(rng: random.Random) -> bytes:
    """An image whose bytes are changed; in a PNG, often with the right sums."""
    content = _images()[rng.choice(list(_images()))]
    if not content.startswith(b"\x89PNG") or rng.random() < 0.3:
        return mutated(rng, content, most=8)
    place, chunks = 8, []
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], content[place + 8 : end - 4]))
        place = end
    for _ in range(1 + rng.randrange(3)):
        at = rng.randrange(len(chunks))
        kind, body = chunks[at]
        chunks[at] = (
            rng.choice([kind, kind, b"IDAT", b"zTXt", b"iCCP", b"PLTE", b"tRNS", b"acTL"]),
            mutated(rng, body),
        )
    rng.random() < 0.3 and chunks.append(rng.choice(chunks))
    sums = ((kind, body, zlib.crc32(kind + body)) for kind, body in chunks)
    return content[:8] + b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", s) for k, b, s in sums)


@cache
def _zips() -> list[bytes]:
    found = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", compression) as archive:
            archive.writestr("a.png", _images()["a.png"])
            archive.writestr("a.txt", "a ball")
            archive.writestr("10_zumi/b.jpg" if compression == zipfile.ZIP_LZMA else "b.jpg", _images()["a.jpg"])
            archive.writestr("metadata.jsonl", '{"file_name": "b.jpg", "text": "a red ball"}\n')
        found.append(content.getvalue())
    return found


def packed(rng: random.Random) -> bytes:
    """A zip of images and captions whose bytes are changed, most often in its list of files."""
    content = rng.choice(_zips())
    if rng.random() < 0.4:
        return mutated(rng, content)
    start = content.index(b"PK\1\2")
    return content[:start] + mutated(rng, content[start:], [b"../", b"/", b"\\", b"\0", b"PK\5\6", b"PK\6\7"])


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "text": text, "jsonl": jsonl, "settings": settings, "safetensors": safetensors, "zip": packed, "image": image,
}  # fmt: skip


def content_of(kind: str, number: int) -> bytes:
    """The n-th input of a kind."""
    return KINDS[kind](random.Random(f"{kind} {number}"))
