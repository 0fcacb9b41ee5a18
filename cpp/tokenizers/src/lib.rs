//! What libsd35 takes from Rust, as C functions: tokenizers of `tokenizer.json` files, headers of
//! safetensors files, and SHA-256.
//!
//! `include/sd35_tokenizers.h` declares them. No panic leaves a function: it becomes an error.

mod boundary;
mod safetensors_header;
mod sha256;
mod tokenizer;
