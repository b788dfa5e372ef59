// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function formatBytes(bytes) {
  const power = bytes > 0 ? Math.min(UNITS.length - 1, Math.floor(Math.log2(bytes) / 10)) : 0;
  const value = bytes / 1024 ** power;
  return `${value >= 100 || power === 0 ? Math.round(value) : value.toFixed(1)} ${UNITS[power]}`;
}

export function formatCount(count) {
  return count.toLocaleString("en-US");
}

/** Write a rate or a time with three digits at most. */
export function formatNumber(value) {
  if (value >= 100 || value === 0) return Math.round(value).toString();
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function formatShare(share) {
  const percent = share * 100;
  return `${percent > 0 && percent < 10 ? percent.toFixed(percent < 1 ? 2 : 1) : Math.round(percent)} %`;
}

export function formatSeconds(seconds) {
  const whole = Math.round(seconds);
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  const hours = Math.floor(whole / 3600);
  return hours < 48 ? `${hours} h ${Math.floor((whole % 3600) / 60)} min` : `${Math.floor(hours / 24)} days`;
}
