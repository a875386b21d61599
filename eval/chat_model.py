"""A small chat model to serve: given weights, a byte-level fast tokenizer and a chat template.

`eval/tiny_lm` comes with ByT5's tokenizer, which is Python; transformers' server streams with the
compiled one only. The ids are the same.
"""

import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_LM = Path(__file__).parent / "tiny_lm"
FIRST_BYTE = 3  # behind <pad>, </s>, <unk>
NUM_IDS = FIRST_BYTE + 256 + 2  # and the two that mark a message


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a byte, 3 ids higher, or one of five special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    names = ["<pad>", "</s>", "<unk>", *(characters[byte] for byte in range(256))]
    names += ["<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
    )


def save_tiny_lm_chat(folder: Path) -> Path:
    """The weights of `eval/tiny_lm` with a tokenizer that can be served; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(TINY_LM / name, folder / name)
    byte_tokenizer().save_pretrained(folder)
    return folder
