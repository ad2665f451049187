"""A tiny random model whose tokens are bytes, with a chat template that knows tools; its server."""

import contextlib
import threading

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% if calm %}(calm)\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_small(path, context=512, ends=0):
    """A folder that `quantpage serve` takes; ends: the token that ends an answer, or None."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: at for at, name in enumerate(["<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=ends,
    )
    tf.LlamaForCausalLM(config).float().save_pretrained(path)
    return path


@contextlib.contextmanager
def answering(folder, key, max_body=None, **options):
    """The address of a server of that folder, in this process; options: of ServeOptions."""
    import uvicorn

    from quantpage.server.app import create_app
    from quantpage.server.options import ServeOptions
    from quantpage.server.run import bind, load

    given = ServeOptions(str(folder), name="small", memory=1 << 20, page_size=16, **options)
    attached, served = load(given)
    listener = bind("127.0.0.1", 0)
    more = {} if max_body is None else {"max_body": max_body}
    app = create_app(served, key, allow_origins=given.allow_origins, **more)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    attached.detach()
