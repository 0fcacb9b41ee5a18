// A cache that is bounded in bytes.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <utility>

namespace libsd35 {

// The values that were used last, of together no more than so many bytes; what is larger alone is
// not kept. One thread at a time.
template <typename Key, typename Value>
class ByteCache {
  public:
    using Shared = std::shared_ptr<const Value>;

    explicit ByteCache(std::uint64_t limit) : limit_(limit) {}

    // Counts as used; NULL where it is not held.
    Shared get(const Key& key) {
        const auto found = places_.find(key);
        if (found == places_.end()) return nullptr;
        entries_.splice(entries_.end(), entries_, found->second);
        return found->second->value;
    }

    // Takes the place of those that were not used for longest.
    void put(const Key& key, Shared value, std::uint64_t bytes) {
        if (const auto old = places_.find(key); old != places_.end()) remove(old->second);
        bytes_ += bytes;
        places_[key] = entries_.insert(entries_.end(), Entry{key, std::move(value), bytes});
        while (bytes_ > limit_) remove(entries_.begin());
    }

    // Forgets everything.
    void clear() {
        places_.clear();
        entries_.clear();
        bytes_ = 0;
    }

  private:
    struct Entry {
        Key key;
        Shared value;
        std::uint64_t bytes;
    };
    using Iterator = typename std::list<Entry>::iterator;

    void remove(Iterator entry) {
        bytes_ -= entry->bytes;
        places_.erase(entry->key);
        entries_.erase(entry);
    }

    std::uint64_t limit_;
    std::uint64_t bytes_ = 0;
    std::list<Entry> entries_;  // the one that was used last, last
    std::map<Key, Iterator> places_;
};

}  // namespace libsd35
