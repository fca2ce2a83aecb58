import sys
from tokenizers import Tokenizer
from examples.stories import train
if __name__ == "__main__":
    args = train.parse_args(["--out", "x", "--cache", sys.argv[1]])
    r = train.load_documents(args, Tokenizer.from_file("examples/stories/_tok.json"))
    print({k: v.shape for k, v in r.items()})
