//! SHA-256, piece by piece.

use sha2::{Digest, Sha256};

use crate::boundary::bytes;

#[no_mangle]
pub extern "C" fn sd35_sha256_new() -> *mut Sha256 {
    Box::into_raw(Box::new(Sha256::new()))
}

/// # Safety
/// `state` is of `sd35_sha256_new`; `data` has `size` bytes.
#[no_mangle]
pub unsafe extern "C" fn sd35_sha256_update(state: *mut Sha256, data: *const u8, size: usize) {
    (*state).update(bytes(data, size));
}

/// # Safety
/// `state` is of `sd35_sha256_new`; `digest` has room for 32 bytes, which are written.
#[no_mangle]
pub unsafe extern "C" fn sd35_sha256_digest(state: *const Sha256, digest: *mut u8) {
    let value = (*state).clone().finalize();
    std::slice::from_raw_parts_mut(digest, 32).copy_from_slice(&value);
}

/// # Safety
/// `state` is of `sd35_sha256_new`, and is not used afterwards.
#[no_mangle]
pub unsafe extern "C" fn sd35_sha256_free(state: *mut Sha256) {
    if !state.is_null() {
        drop(Box::from_raw(state));
    }
}
