//! The boundary to C: messages as allocated strings, and panics that stop here.

use std::ffi::{c_char, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A panic is told as an error; this copy of the standard library prints nothing of it.
static QUIET: Once = Once::new();

/// What `work` returns; `None` where it fails or panics, and `error` then has the reason.
///
/// # Safety
/// `error` is null or points to a pointer that may be overwritten.
pub unsafe fn guarded<T>(
    error: *mut *mut c_char,
    work: impl FnOnce() -> Result<T, Failure>,
) -> Option<T> {
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let reason = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(failure)) => failure.to_string(),
        Err(panic) => panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "it panicked".to_owned()),
    };
    if !error.is_null() {
        // A C string ends at the first NUL.
        let text = CString::new(reason.replace('\0', " ")).unwrap_or_default();
        *error = text.into_raw();
    }
    None
}

/// Bytes that C has; null is none.
///
/// # Safety
/// `data` is null, or `size` bytes are there while the result is used.
pub unsafe fn bytes<'a>(data: *const u8, size: usize) -> &'a [u8] {
    if data.is_null() {
        &[]
    } else {
        std::slice::from_raw_parts(data, size)
    }
}

/// # Safety
/// `message` is null or came from this library, and is not used afterwards.
#[no_mangle]
pub unsafe extern "C" fn sd35_rust_message_free(message: *mut c_char) {
    if !message.is_null() {
        drop(CString::from_raw(message));
    }
}
