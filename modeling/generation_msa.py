from transformers.generation import GenerationMixin
from .memory_encoding import encode_documents
class MSAGenerationMixin(GenerationMixin):
    def encode_memory(self, documents, tokenizer, **kw):
        return encode_documents(self, documents, tokenizer, **kw)
