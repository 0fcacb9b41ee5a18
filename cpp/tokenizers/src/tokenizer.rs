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
        let whole = encode(&mut *tokenizer, text, None, true)?;
        let room = std::slice::from_raw_parts_mut(ids, length);
        room.fill(pad_id);
        if whole.len() <= length {
            write(room, &whole);
        } else {
            write(room, &encode(&mut *tokenizer, text, Some(length), true)?);
        }
        Ok(whole.len() as i64)
    });
    count.unwrap_or(-1)
}

/// Writes at most `room` ids and returns how many tokens the text has; -1 where it fails.
///
/// # Safety
/// As of `sd35_tokenizer_encode`; `ids` has room for `room`.
#[no_mangle]
pub unsafe extern "C" fn sd35_tokenizer_tokens(
    tokenizer: *mut Tokenizer,
    text: *const u8,
    size: usize,
    special: bool,
    room: usize,
    ids: *mut i64,
    error: *mut *mut c_char,
) -> i64 {
    let count = guarded(error, || {
        let text = from_utf8(bytes(text, size))?;
        let encoding = encode(&mut *tokenizer, text, None, special)?;
        if room != 0 {
            write(std::slice::from_raw_parts_mut(ids, room), &encoding);
        }
        Ok(encoding.len() as i64)
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

/// With special tokens or without; cut at the end to `most`, special tokens kept.
///
/// A text is encoded whole before it is cut: what the library says of the rest of a text that it
/// cuts differs from version to version.
fn encode(
    tokenizer: &mut Tokenizer,
    text: &str,
    most: Option<usize>,
    special: bool,
) -> Result<Encoding, Failure> {
    // The rest is that of the library's `enable_truncation`: from the right, without overlap.
    let truncation = most.map(|max_length| TruncationParams {
        max_length,
        ..Default::default()
    });
    tokenizer.with_truncation(truncation)?;
    tokenizer.encode(text, special)
}

fn write(room: &mut [i64], encoding: &Encoding) {
    for (place, id) in room.iter_mut().zip(encoding.get_ids()) {
        *place = i64::from(*id);
    }
}
