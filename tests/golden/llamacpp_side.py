"""What llama.cpp makes of texts. `ask` runs this file in an environment with llama-cpp-python.

stdin: JSON list of {"file": GGUF path, "texts": [...], "special": bool}
stdout: JSON list of {"ids": [ids of each text, no BOS], "ends": ids that end an answer}
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from typing import Any


def ask(python: str, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of llama.cpp in the environment of `python`; see above. Raises CalledProcessError."""
    done = subprocess.run([python, __file__], input=json.dumps(asked), capture_output=True, text=True, check=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def answer(file: str, texts: list[str], special: bool = False) -> dict[str, Any]:
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(file.encode(), parameters)
    vocab = llama_cpp.llama_model_get_vocab(model)
    made = []
    for text in texts:
        data = text.encode()
        room = len(data) + 16
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, ctypes.c_int32(room), False, special)
        made.append(list(ids[:count]))
    ends = [i for i in range(llama_cpp.llama_vocab_n_tokens(vocab)) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    llama_cpp.llama_model_free(model)
    return {"ids": made, "ends": ends}


if __name__ == "__main__":
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    json.dump([answer(**asked) for asked in json.load(sys.stdin)], sys.stdout)
