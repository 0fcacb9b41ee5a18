//! The header of a safetensors file: what its tensors are, and where they lie.

use std::collections::BTreeMap;
use std::ffi::c_char;
use std::ptr::{null, null_mut};

use safetensors::tensor::{Dtype, TensorInfo};
use safetensors::SafeTensors;

use crate::boundary::{bytes, guarded};

// Before the header: how long it is.
const LENGTH_BYTES: usize = 8;

/// Tensors in the order of their names, and entries of the metadata.
pub struct Header {
    first: usize,
    tensors: Vec<(String, TensorInfo)>,
    metadata: BTreeMap<String, String>,
}

/// A tensor; pointers are valid as long as the header. `begin` and `end` are places in the file.
#[repr(C)]
pub struct Entry {
    name: *const u8,
    name_size: usize,
    is_float32: i32,
    rank: usize,
    shape: *const usize,
    begin: usize,
    end: usize,
}

/// # Safety
/// `data` has `size` bytes; `error` is null or points to a pointer that may be overwritten.
#[no_mangle]
pub unsafe extern "C" fn sd35_safetensors_open(
    data: *const u8,
    size: usize,
    error: *mut *mut c_char,
) -> *mut Header {
    let opened = guarded(error, || {
        let (length, metadata) = SafeTensors::read_metadata(bytes(data, size))?;
        let first = LENGTH_BYTES + length;
        let mut tensors: Vec<_> = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| (name, info.clone()))
            .collect();
        // Offsets whose sum wraps around are in order, too.
        if tensors.iter().any(|(_, t)| t.data_offsets.1 > size - first) {
            return Err("a tensor lies outside of the file".into());
        }
        tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
        let metadata = metadata.metadata().clone().into_iter().flatten().collect();
        Ok(Box::into_raw(Box::new(Header {
            first,
            tensors,
            metadata,
        })))
    });
    opened.unwrap_or(null_mut())
}

/// # Safety
/// `header` is of `sd35_safetensors_open`.
#[no_mangle]
pub unsafe extern "C" fn sd35_safetensors_count(header: *const Header) -> usize {
    (*header).tensors.len()
}

/// # Safety
/// `header` is of `sd35_safetensors_open`, `index` below its count.
#[no_mangle]
pub unsafe extern "C" fn sd35_safetensors_tensor(header: *const Header, index: usize) -> Entry {
    let header = &*header;
    let (name, info) = &header.tensors[index];
    Entry {
        name: name.as_ptr(),
        name_size: name.len(),
        is_float32: i32::from(info.dtype == Dtype::F32),
        rank: info.shape.len(),
        shape: info.shape.as_ptr(),
        begin: header.first + info.data_offsets.0,
        end: header.first + info.data_offsets.1,
    }
}

/// An entry of the metadata and its `size`; null where there is none.
///
/// # Safety
/// `header` is of `sd35_safetensors_open`; `key` has `key_size` bytes; `size` may be written.
#[no_mangle]
pub unsafe extern "C" fn sd35_safetensors_metadata(
    header: *const Header,
    key: *const u8,
    key_size: usize,
    size: *mut usize,
) -> *const u8 {
    let header = &*header;
    let value = std::str::from_utf8(bytes(key, key_size))
        .ok()
        .and_then(|key| header.metadata.get(key));
    *size = value.map_or(0, String::len);
    value.map_or(null(), |text| text.as_ptr())
}

/// # Safety
/// `header` is null or of `sd35_safetensors_open`, and is not used afterwards.
#[no_mangle]
pub unsafe extern "C" fn sd35_safetensors_free(header: *mut Header) {
    if !header.is_null() {
        drop(Box::from_raw(header));
    }
}
