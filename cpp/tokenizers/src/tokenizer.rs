//! A tokenizer that cuts and pads to a length, as `runtime/text.py` does.

use std::ffi::c_char;
use std::ptr::null_mut;
use std::str::from_utf8;

use tokenizers::{Encoding, Tokenizer, TruncationParams};

use crate::boundary::{bytes, guarded, Failure};

/// # Safety
/// `json` has `size` bytes; `error` is null or points to a pointer that may be overwritten.
#[no_mangle]
pub unsafe extern "C" fn sd35_tokenizer_open(
    json: *const u8,
    size: usize,
    error: *mut *mut c_char,
) -> *mut Tokenizer {
    let opened = guarded(error, || {
        let mut tokenizer = Tokenizer::from_bytes(bytes(json, size))?;
        tokenizer.with_padding(None);
        Ok(Box::into_raw(Box::new(tokenizer)))
    });
    opened.unwrap_or(null_mut())
}

/// Writes `length` ids and returns how many tokens the whole text has; -1 where it fails.
///
/// # Safety
/// `tokenizer` is of `sd35_tokenizer_open`, and no other thread uses it meanwhile; `text` has
/// `size` bytes, `ids` room for `length`; `error` is null or points to a pointer that may be
/// overwritten.
#[no_mangle]
pub unsafe extern "C" fn sd35_tokenizer_encode(
    tokenizer: *mut Tokenizer,
    text: *const u8,
    size: usize,
    length: usize,
    pad_id: i64,
    ids: *mut i64,
    error: *mut *mut c_char,
) -> i64 {
    let count = guarded(error, || {
        let text = from_utf8(bytes(text, size))?;
        let encoding = encode(&mut *tokenizer, text, length)?;
        let room = std::slice::from_raw_parts_mut(ids, length);
        room.fill(pad_id);
        for (place, id) in room.iter_mut().zip(encoding.get_ids()) {
            *place = i64::from(*id);
        }
        Ok(whole_length(&encoding) as i64)
    });
    count.unwrap_or(-1)
}

/// # Safety
/// `tokenizer` is null or of `sd35_tokenizer_open`, and is not used afterwards.
#[no_mangle]
pub unsafe extern "C" fn sd35_tokenizer_free(tokenizer: *mut Tokenizer) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

fn encode(tokenizer: &mut Tokenizer, text: &str, length: usize) -> Result<Encoding, Failure> {
    // The rest is that of the library's `enable_truncation`: from the right, without overlap.
    let truncation = TruncationParams {
        max_length: length,
        ..Default::default()
    };
    tokenizer.with_truncation(Some(truncation))?;
    tokenizer.encode(text, true)
}

/// Tokens before the text was cut: overflowing parts have special tokens of their own.
fn whole_length(encoding: &Encoding) -> usize {
    let special: u32 = encoding.get_special_tokens_mask().iter().sum();
    let parts = encoding.get_overflowing().iter();
    let overflow: usize = parts
        .map(|part| part.get_ids().len().saturating_sub(special as usize))
        .sum();
    encoding.get_ids().len() + overflow
}
