"""A file a family: its config.json in our terms, and its tensors as rows of ours (`fastlm.interop.family`).

    gpt2.py  llama.py (Mistral, Qwen 2)  bloom.py  mpt.py       decoders
    bert.py  roberta.py  albert.py  electra.py                  encoders
    deberta.py (v1, v2)  xlnet.py
    bart.py  t5.py (mT5, UMT5)                                   encoder–decoders
    own.py                                                      what transformers has no model for

A model is saved as the first family that it belongs to, so that an ALBERT which shares nothing is an ELECTRA. To add a
family, write its file and name it here.
"""

from fastlm.interop.families.albert import ALBERT
from fastlm.interop.families.bart import BART
from fastlm.interop.families.bert import BERT
from fastlm.interop.families.bloom import BLOOM
from fastlm.interop.families.deberta import DEBERTA, DEBERTA_V2
from fastlm.interop.families.electra import ELECTRA
from fastlm.interop.families.gpt2 import GPT2
from fastlm.interop.families.llama import LLAMA, MISTRAL, QWEN2
from fastlm.interop.families.mpt import MPT
from fastlm.interop.families.own import OWN
from fastlm.interop.families.roberta import ROBERTA
from fastlm.interop.families.t5 import MT5, T5, UMT5
from fastlm.interop.families.xlnet import XLNET
from fastlm.interop.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        GPT2, LLAMA, MISTRAL, QWEN2, BLOOM, MPT, BERT, ROBERTA, ELECTRA, ALBERT, DEBERTA, DEBERTA_V2, XLNET, BART, T5,
        MT5, UMT5, OWN,
    )
}  # fmt: skip
